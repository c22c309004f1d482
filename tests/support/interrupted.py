"""Sharding and merging that stop half-way."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.work import digests as digests
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.model.stored import stored_layout
from tightfit.sharding.manifest import Manifest
from tightfit.sharding.shard import prepare, shard

CALLS = ("copy_file_range", "pwrite", "pwritev", "write", "open", "close", "rename", "unlink")
CALLS += ("fsync", "mkdir", "ftruncate", "posix_fallocate", "pread")


class Counted:
    """Counts calls of the system; dies before that with number `last`, or is interrupted by it."""

    def __init__(self, last: int = 2**60, *, number: signal.Signals = signal.SIGKILL) -> None:
        self.count, self.last, self.number = 0, last, number

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            now = self.count == self.last
            if now and self.number == signal.SIGKILL:
                os.kill(os.getpid(), self.number)
            result = function(*args, **kwargs)
            if now:
                os.kill(os.getpid(), self.number)
            return result

        return called

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.wrap(getattr(os, name)))


def in_child(
    work: Callable[[], object], last: int = 2**60, *, number: signal.Signals = signal.SIGKILL
) -> int:
    """Do something in a child that gets a signal at a call; the number of its calls, or -9."""
    reader, writer_end = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        counted = Counted(last, number=number)
        counted.install()
        try:
            work()
            os.write(writer_end, str(counted.count).encode())
        finally:
            os._exit(0)
    os.close(writer_end)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -9
    assert data, "the child failed"
    return int(data)


def write(
    model: Path, out: Path, size: int = 2, bars: NoProgress | None = None, **options: Any
) -> Manifest:
    resume = options.pop("resume", False)
    job = prepare(
        open_checkpoint(str(model)),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=size,
        max_shard_bytes=options.pop("max_shard_bytes", 10**5),
        **options,
    )
    return shard(job, out, bars or NoProgress(), resume=resume).manifest


class Copied(NoProgress):
    """Remembers the totals of phases."""

    def __init__(self, stop_after: float = 2.0) -> None:
        self.totals: dict[str, int] = {}
        self.stop_after, self.left = stop_after, 2.0**60

    def phase(self, name: str, total_bytes: int) -> None:
        self.totals[name] = total_bytes
        self.left = self.stop_after * total_bytes if name == "copying" else 2.0**60

    def advance(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            raise KeyboardInterrupt


def begin(model: Path, out: Path, share: float = 0.6) -> int:
    """Interrupt at a share of the work; returns the bytes of all of it."""
    bars = Copied(share)
    with pytest.raises(KeyboardInterrupt):
        write(model, out, bars=bars, resume=True)
    return bars.totals["copying"]
