"""`tightfit shard`: per-rank checkpoints for `--load-format sharded_state`."""

import shlex
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.source import is_remote, local_path_of
from tightfit.cli import options as o
from tightfit.cli.options import quantization as q
from tightfit.cli.options import writing as w
from tightfit.cli.options.layout import EnableExpertParallel, PipelineParallelSize
from tightfit.cli.output import console, guarded, note, one_line, print_json, progress, warn
from tightfit.cli.shard_quantized import SCHEMES, asked_from, computing, quantized
from tightfit.cli.shards import served, served_with
from tightfit.errors import UsageError
from tightfit.executors import open_executor
from tightfit.model.stored import DEFAULT_LAYOUT, LAYOUTS, stored_layout
from tightfit.quantize.recipe_file import DATA_FREE
from tightfit.sharding.proof.vllm_load import show_versions
from tightfit.sharding.ranks import parse_ranks, show_ranks
from tightfit.sharding.shard import ShardJob, prepare
from tightfit.sharding.shard import shard as write
from tightfit.sharding.side_files import left_behind
from tightfit.units import format_bytes


@guarded
def shard(
    model: o.Model,
    out: w.Out,
    tensor_parallel_size: o.TensorParallelSize = 1,
    pipeline_parallel_size: PipelineParallelSize = None,
    enable_expert_parallel: EnableExpertParallel = None,
    max_shard_size: w.MaxShardSize = "5GB",
    layout: Annotated[
        str,
        typer.Option(
            help="Engine that will load it: "
            + ", ".join(LAYOUTS)
            + "; or a version, such as vllm-0.25.1. Only the default was loaded in its engine, the "
            "others were read in sources."
        ),
    ] = DEFAULT_LAYOUT,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="0-3,7",
            help="Write only these; OUT is whole once all have come.",
            show_default=False,
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            rich_help_panel=q.PANEL,
            help="Quantize on the way: " + ", ".join(SCHEMES) + ".",
            show_default=False,
        ),
    ] = None,
    group_size: q.GroupSize = None,
    file_format: q.FileFormat = None,
    recipe: q.Recipe = None,
    ignore: q.Ignore = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DATA_FREE),
            rich_help_panel=q.PANEL,
            help="How values are chosen.",
            show_default="rtn",
        ),
    ] = None,
    resume: w.Resume = False,
    executor: w.ExecutorName = "local",
    ray_address: w.RayAddress = None,
    dry_run: w.DryRun = False,
    revision: o.Revision = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Cut a checkpoint into one set of files per rank, byte for byte, without a GPU.

    vLLM loads the result with --load-format sharded_state, and `tightfit run` with nothing.

    Example: tightfit shard ./Qwen3-8B ./Qwen3-8B-tp2 --tensor-parallel-size 2
    """
    if not 1 <= tensor_parallel_size <= 1024:
        raise UsageError(
            f"--tensor-parallel-size {tensor_parallel_size} is out of range", hint="at least 1"
        )
    stages = 1 if pipeline_parallel_size is None else pipeline_parallel_size
    if not 1 <= stages <= 1024:
        raise UsageError(f"--pipeline-parallel-size {stages} is out of range", hint="at least 1")
    w.check_out(out)
    size = w.shard_bytes(max_shard_size)
    chosen = stored_layout(layout)
    asked = asked_from(
        quantize,
        recipe,
        group_size=group_size,
        file_format=file_format,
        ignore=ignore or (),
        method=method,
    )
    # What is written elsewhere, or in part, needs no copy of the whole model here.
    download = not (dry_run or is_remote(out) or ranks)
    checkpoint = open_checkpoint(model, revision=revision, download=download)
    made = None if asked is None else quantized(checkpoint, asked)
    job = prepare(
        checkpoint if made is None else made.checkpoint,
        chosen,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=stages,
        expert_parallel=bool(enable_expert_parallel),
        max_shard_bytes=size,
        ranks=None if ranks is None else parse_ranks(ranks),
        bundles={} if made is None else made.bundles,
        quantized={} if made is None else made.document,
    )
    remarks = () if made is None else made.remarks
    for text in (*left_behind(checkpoint), *job.notes, *_dropped(job), *remarks):
        warn(text)
    missing: tuple[int, ...] = ()
    fresh = not dry_run
    if not dry_run:
        with (
            open_executor(executor, "shard", ray_address=ray_address, notice=warn) as spread,
            progress(quiet=quiet) as bars,
            computing(made),
        ):
            if is_remote(out):
                from tightfit.sharding.remote.upload import shard_to

                if spread is not None:
                    raise UsageError(
                        f"--executor {executor} writes to a shared directory, and not to {out}",
                        hint="start `tightfit shard OUT --ranks ...` on each machine instead",
                    )
                done = shard_to(job, out, bars, resume=resume, notice=note)
            else:
                path = local_path_of(out)
                done = write(job, path, bars, resume=resume, executor=spread)
            missing, fresh = done.manifest.missing_ranks, done.fresh
    if as_json:
        print_json(_document(job, out, fresh, missing))
    elif dry_run or not quiet:
        verb = "would write" if dry_run else "wrote" if fresh else ""
        _show(job, out, verb, missing, "" if asked is None else asked.wish.label)


def _dropped(job: ShardJob) -> Iterator[str]:
    """What a sharded source has and the result has not: only the flags of a call count."""
    manifest = None if job.cut_again is None else job.cut_again.manifest
    if manifest is None:
        return
    if manifest.pipeline_parallel_size > 1 and job.parallel.pipeline_parallel_size == 1:
        yield (
            f"{job.checkpoint.name} has {manifest.pipeline_parallel_size} pipeline stages, and the "
            "output has one, for want of --pipeline-parallel-size"
        )
    if manifest.expert_parallel and not job.parallel.expert_parallel:
        yield (
            f"{job.checkpoint.name} has whole experts on each rank, and the output has slices of "
            "all, for want of --enable-expert-parallel"
        )


def _document(job: ShardJob, out: str, fresh: bool, missing: tuple[int, ...]) -> dict[str, Any]:
    return {
        "schema": 1,
        "model": job.checkpoint.name,
        "output": out,
        "written": fresh,
        **({"quantized": dict(job.quantized)} if job.quantized else {}),
        "layout": job.layout.name,
        "tensor_parallel_size": job.parallel.tensor_parallel_size,
        "pipeline_parallel_size": job.parallel.pipeline_parallel_size,
        "expert_parallel": job.parallel.expert_parallel,
        "ranks": list(job.ranks),
        "missing_ranks": list(missing),
        "total_bytes": job.output_bytes,
        "files": [
            {
                "name": part.name,
                "rank": part.rank.rank,
                "nbytes": part.nbytes,
                "tensors": len(part.placed),
            }
            for part in job.parts
        ],
    }


def _show(job: ShardJob, out: str, verb: str, missing: tuple[int, ...], scheme: str) -> None:
    """What was done; without a `verb` it was done before."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("file")
    table.add_column("tensors", justify="right")
    table.add_column("size", justify="right")
    for part in job.parts:
        table.add_row(part.name, f"{len(part.placed):,}", format_bytes(part.nbytes))
    page = console()
    ranks, size = len(job.ranks), job.parallel.world_size
    files = "1 file" if len(job.parts) == 1 else f"{len(job.parts)} files"
    what = (
        f"{files}, {format_bytes(job.output_bytes)}, for {ranks} "
        f"{f'of {size} ' if ranks < size else ''}rank{'s' if size > 1 else ''}"
    )
    summary = f"{verb} {what} to {out}" if verb else f"{out} holds all of it already: {what}"
    summary += f", quantized: {scheme}" if scheme else ""
    page.print(table)
    page.print(Text(one_line(summary)), soft_wrap=True)
    if missing:
        page.print(Text(f"not whole yet; missing ranks: {show_ranks(missing)}"))
    elif verb == "would write" and job.layout.name.startswith("vllm"):
        flags = served_with(job.parallel)
        text = f"vLLM {show_versions(job.layout)} would load it with {flags}"
        page.print(Text(text), soft_wrap=True)
    elif verb != "would write" and (command := _next(job, out)) is not None:
        page.print(Text(one_line(f"next: {command}")), soft_wrap=True)


def _next(job: ShardJob, out: str) -> str | None:
    """The command that loads what was written, if an engine can read it where it is."""
    engine, size = job.layout.name.partition("-")[0], job.parallel.tensor_parallel_size
    if is_remote(out):
        if engine != "vllm" or not out.startswith("s3://"):
            return None
        # `sharded_state` reads local files only.
        return f"vllm serve {out} {served_with(job.parallel, 'runai_streamer_sharded')}"
    path = shlex.quote(out)
    if engine == "vllm":
        return served(out, job.parallel)
    if engine == "sglang":
        server = f"python -m sglang.launch_server --model-path {path}"
        return f"{server} --load-format sharded_state --tp-size {size}"
    return f"tightfit run {path}"
