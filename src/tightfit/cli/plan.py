"""`tightfit plan`: what a model will need, line by line, before renting anything."""

from pathlib import Path
from typing import Annotated

import typer

from tightfit.cli import options as o
from tightfit.cli.output import console, guarded, print_json
from tightfit.cli.shards import read_shards
from tightfit.cli.shards import tensor_parallel_size as shard_size
from tightfit.errors import ExitCode, UsageError
from tightfit.planner.api import plan_model
from tightfit.planner.plan import COMPONENTS, Plan


@guarded
def plan(
    model: o.Model,
    gpu: o.Gpu = None,
    gpu_memory: o.GpuMemory = None,
    engine: Annotated[str, typer.Option(help="vllm, or tightfit's builtin runtime.")] = "vllm",
    engine_version: Annotated[
        str | None, typer.Option(help="Version of the engine.", show_default="newest modelled")
    ] = None,
    entrypoint: Annotated[
        str, typer.Option(help="vLLM's defaults depend on it: server or llm.")
    ] = "server",
    tensor_parallel_size: o.ShardedTensorParallelSize = None,
    pipeline_parallel_size: o.PipelineParallelSize = 1,
    max_model_len: o.MaxModelLen = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxNumBatchedTokens = None,
    gpu_memory_utilization: o.GpuMemoryUtilization = None,
    kv_cache_memory_bytes: o.KvCacheMemoryBytes = None,
    block_size: o.BlockSize = None,
    dtype: o.Dtype = "auto",
    kv_cache_dtype: o.KvCacheDtype = "auto",
    enforce_eager: o.EnforceEager = False,
    cudagraph_capture_sizes: o.CudagraphCaptureSizes = None,
    max_cudagraph_capture_size: o.MaxCudagraphCaptureSize = None,
    use_v2_model_runner: o.UseV2ModelRunner = None,
    explain: Annotated[
        str | None,
        typer.Option(help="Print how one component was computed.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Also write the view as a picture (.svg).", show_default=False),
    ] = None,
    revision: o.Revision = None,
    as_json: o.Json = False,
) -> None:
    """Predict the memory of every rank, and say whether it fits.

    Needs no GPU and downloads no weights: of a Hub id it reads the config and the headers.

    Example: tightfit plan Qwen/Qwen3-8B --gpu rtx4090-24gb --max-model-len 16K
    """
    wanted = o.plan_options(
        engine=engine,
        engine_version=engine_version,
        entrypoint=entrypoint,
        gpu=gpu,
        gpu_memory=gpu_memory,
        tensor_parallel_size=shard_size(tensor_parallel_size, read_shards(model), model),
        pipeline_parallel_size=pipeline_parallel_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        block_size=block_size,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        enforce_eager=enforce_eager,
        cudagraph_capture_sizes=cudagraph_capture_sizes,
        max_cudagraph_capture_size=max_cudagraph_capture_size,
        use_v2_model_runner=use_v2_model_runner,
    )
    result = plan_model(model, wanted, revision=revision).plan
    if explain is not None:
        _explain(result, explain)
        return
    if as_json:
        print_json(result.to_json())
    else:
        _show(result)
    if report is not None:
        _picture(result, report)
    if result.verdict.fits is False:
        raise typer.Exit(ExitCode.FINDING)


def _show(plan: Plan) -> None:
    from tightfit.cli.render import render_plan

    render_plan(plan, console())


def _explain(plan: Plan, name: str) -> None:
    """One line per rank, or one for all if they are alike."""
    lines: dict[str, list[int]] = {}
    for rank in plan.ranks:
        for component in rank.components:
            if component.name == name:
                lines.setdefault(component.formula, []).append(rank.rank)
    if not lines:
        known = [c for c in COMPONENTS if any(c == one.name for one in plan.ranks[0].components)]
        raise UsageError(f"the plan has no component {name!r}", hint="it has " + ", ".join(known))
    for formula, ranks in lines.items():
        where = "" if len(lines) == 1 else f" on rank {', '.join(map(str, ranks))}"
        print(f"{name}{where}: {formula}")


def _picture(plan: Plan, path: Path) -> None:
    import io

    from rich.console import Console

    from tightfit.cli.render import render_plan
    from tightfit.errors import OutputError

    if path.suffix != ".svg":
        raise UsageError(f"--report {path}: cannot write {path.suffix or 'that'}", hint="use .svg")
    page = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, highlight=False)
    render_plan(plan, page)
    try:
        path.write_text(page.export_svg(title=f"tightfit plan {plan.model.name}"), "utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}", hint="check the directory"
        ) from error
