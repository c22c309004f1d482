"""The main jobs as one call each, for tests that need their result."""

from pathlib import Path

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.model.stored import DEFAULT_LAYOUT, stored_layout
from tightfit.sharding.manifest import Manifest
from tightfit.sharding.shard import prepare, shard


def write_shards(
    model: Path,
    out: Path,
    tensor_parallel_size: int,
    *,
    pipeline_parallel_size: int = 1,
    layout: str = DEFAULT_LAYOUT,
    max_shard_bytes: int = 5 * 10**9,
) -> Manifest:
    job = prepare(
        open_checkpoint(str(model)),
        stored_layout(layout),
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        max_shard_bytes=max_shard_bytes,
    )
    return shard(job, out, NoProgress())
