"""Sharding that stops half-way."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.model.stored import stored_layout
from tightfit.sharding.manifest import Manifest
from tightfit.sharding.shard import prepare, shard


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
    return shard(job, out, bars or NoProgress(), resume=resume)


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


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
