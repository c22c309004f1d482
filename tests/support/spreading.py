"""Sharding on a Ray cluster, slowly enough to be disturbed; also as a process of its own."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.source import LocalSource
from tightfit.cli.output import NoProgress
from tightfit.executors import Advance, Executor, open_executor
from tightfit.model.stored import stored_layout
from tightfit.sharding.manifest import Manifest
from tightfit.sharding.shard import ShardJob, prepare, shard


class InProcess:
    """One task after the other, here."""

    def run(
        self,
        work: Callable[[Any, Any, Advance], Any],
        shared: Any,
        tasks: Sequence[Any],
        *,
        done: Callable[[int, Any], None],
        advance: Advance,
    ) -> None:
        for number, task in enumerate(tasks):
            result = work(shared, task, advance)
            self.before_done(number, task)
            done(number, result)

    def before_done(self, number: int, task: Any) -> None:
        """For tests that disturb."""


class SlowSource:
    """A directory that seems to be far away."""

    def __init__(self, directory: Path, seconds: float) -> None:
        self._source = LocalSource(directory)
        self.label = self._source.label
        self.seconds = seconds

    def exists(self, path: str) -> bool:
        return self._source.exists(path)

    def size(self, path: str) -> int:
        return self._source.size(path)

    def files(self) -> list[str]:
        return self._source.files()

    def others(self) -> list[str]:
        return self._source.others()

    def local_path(self, path: str) -> None:
        return None

    def state(self, path: str) -> list[int | str]:
        return self._source.state(path)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None:
            time.sleep(self.seconds)
        return self._source.read(path, start, stop)


def make_job(model: Path, seconds: float = 0.1, max_shard_bytes: int = 10**5) -> ShardJob:
    checkpoint = open_checkpoint(str(model))
    job = prepare(
        checkpoint,
        stored_layout("vllm-0.32"),
        tensor_parallel_size=2,
        max_shard_bytes=max_shard_bytes,
    )
    if not seconds:
        return job
    return replace(job, checkpoint=replace(checkpoint, source=SlowSource(model, seconds)))


def spread(
    model: Path, out: Path, executor: Executor | None, bars: NoProgress, *, resume: bool = False
) -> Manifest:
    return shard(make_job(model), out, bars, resume=resume, executor=executor).manifest


@dataclass(frozen=True)
class Number:
    name: str
    value: int


def work(shared: int, task: Number, advance: Advance) -> int:
    """A product; some numbers are the end of their worker."""
    advance(1)
    if task.value < 0:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    return shared * task.value


def main() -> None:
    """Its arguments are MODEL OUT ADDRESS shard|resume."""
    model, out, address, how = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open_executor("ray", "shard", ray_address=address, notice=print) as executor:
        try:
            spread(Path(model), Path(out), executor, NoProgress(), resume=how == "resume")
        except KeyboardInterrupt:
            sys.exit(130)
