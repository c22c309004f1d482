"""`tightfit merge`: a plain checkpoint back from a sharded one."""

import os
from typing import Annotated, Any

import typer

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.source import is_remote, local_path_of
from tightfit.cli import options as o
from tightfit.cli.options import writing as w
from tightfit.cli.output import guarded, note, one_line, print_json, progress
from tightfit.errors import ConfigError
from tightfit.sharding.merge import MergeJob, prepare_merge
from tightfit.sharding.merge import merge as write
from tightfit.units import format_bytes


@guarded
def merge(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Output of `tightfit shard`, or its URL, or of vLLM's own script.",
            show_default=False,
        ),
    ],
    out: w.Out,
    max_shard_size: w.MaxShardSize = "5GB",
    resume: w.Resume = False,
    dry_run: w.DryRun = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Put the files of all ranks together to the checkpoint they were made of, tensor for tensor.

    Example: tightfit merge ./Qwen3-8B-tp2 ./Qwen3-8B
    """
    w.check_out(out)
    size = w.shard_bytes(max_shard_size)
    if not is_remote(directory) and not os.path.isdir(local_path_of(directory)):
        raise ConfigError(f"there is no directory {directory}", hint="check the path")
    job = prepare_merge(open_checkpoint(directory), max_shard_bytes=size)
    fresh = not dry_run
    if not dry_run:
        with progress(quiet=quiet) as bars:
            if is_remote(out):
                from tightfit.sharding.remote.plain import write_to

                fresh = write_to(job, out, bars, resume=resume, notice=note)
            else:
                fresh = write(job, local_path_of(out), bars, resume=resume)
    if job.not_returned and not quiet:
        note(
            f"{len(job.not_returned)} tensors of the source, such as {job.not_returned[0]!r}, are "
            "not loaded by engines, and were left out when it was sharded"
        )
    if as_json:
        print_json(_document(job, out, fresh))
    elif dry_run or not quiet:
        tensors = sum(len(part.placed) for part in job.parts)
        files, ranks = len(job.parts), job.cut_again.parallel.world_size
        what = (
            f"{tensors:,} tensors, {format_bytes(job.output_bytes)}, in {files} "
            f"file{'s' if files > 1 else ''}"
        )
        if fresh or dry_run:
            text = f"{'wrote' if fresh else 'would write'} {what} to {out}"
        else:
            text = f"{out} holds all of it already, byte for byte: {what}"
        print(one_line(f"{text}, from {ranks} rank{'s' if ranks > 1 else ''} of {directory}"))


def _document(job: MergeJob, out: str, fresh: bool) -> dict[str, Any]:
    return {
        "schema": 1,
        "output": out,
        "written": fresh,
        "layout": job.cut_again.layout,
        "tensor_parallel_size": job.cut_again.parallel.tensor_parallel_size,
        "pipeline_parallel_size": job.cut_again.parallel.pipeline_parallel_size,
        "expert_parallel": job.cut_again.parallel.expert_parallel,
        "total_bytes": job.output_bytes,
        "not_returned": list(job.not_returned),
        "files": [
            {"name": part.name, "nbytes": part.nbytes, "tensors": len(part.placed)}
            for part in job.parts
        ],
    }
