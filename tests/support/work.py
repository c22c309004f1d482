"""The main jobs as one call each, for tests that need their result."""

import hashlib
from pathlib import Path

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.model.stored import DEFAULT_LAYOUT, stored_layout
from tightfit.sharding.manifest import Manifest
from tightfit.sharding.merge import merge, prepare_merge
from tightfit.sharding.shard import prepare, shard

Stored = dict[str, tuple[str, tuple[int, ...], bytes]]


def stored(directory: Path) -> Stored:
    """dtype, shape and bytes of every tensor of a plain checkpoint."""
    checkpoint = open_checkpoint(str(directory))
    return {
        name: (
            info.dtype,
            info.shape,
            checkpoint.source.read(info.file, info.offset, info.offset + info.nbytes),
        )
        for name, info in checkpoint.tensors().items()
    }


def merged(shards: Path, out: Path, max_shard_bytes: int = 10**9) -> Stored:
    job = prepare_merge(open_checkpoint(str(shards)), max_shard_bytes=max_shard_bytes)
    merge(job, out, NoProgress())
    return stored(out)


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def write_shards(
    model: Path,
    out: Path,
    tensor_parallel_size: int,
    *,
    pipeline_parallel_size: int = 1,
    expert_parallel: bool = False,
    layout: str = DEFAULT_LAYOUT,
    max_shard_bytes: int = 5 * 10**9,
) -> Manifest:
    job = prepare(
        open_checkpoint(str(model)),
        stored_layout(layout),
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        expert_parallel=expert_parallel,
        max_shard_bytes=max_shard_bytes,
    )
    return shard(job, out, NoProgress()).manifest


def merge_shards(shards: Path, out: Path, *, max_shard_bytes: int = 5 * 10**9) -> int:
    """Bytes of the merged checkpoint."""
    job = prepare_merge(open_checkpoint(str(shards)), max_shard_bytes=max_shard_bytes)
    merge(job, out, NoProgress())
    return job.output_bytes
