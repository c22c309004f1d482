"""`tightfit run`: execute the plan with the builtin runtime, and print what it really took."""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.cli import options as o
from tightfit.cli.output import console, guarded, print_json
from tightfit.cli.shards import read_shards, require_runnable
from tightfit.cli.shards import tensor_parallel_size as shard_size
from tightfit.errors import ConfigError, ExitCode, MissingExtraError, TightfitError, UsageError
from tightfit.model.spec import ModelSpec
from tightfit.planner.api import plan_model
from tightfit.planner.plan import Plan

if TYPE_CHECKING:
    from tightfit.runtime.checks import Check
    from tightfit.runtime.options import SamplingParams
    from tightfit.runtime.session import RunReport
    from tightfit.sharding.manifest import Manifest

_GENERATION = "Generation"


@guarded
def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|SHARDS",
            help="A checkpoint, or an output of `tightfit shard`.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Text to answer; may be repeated.",
            rich_help_panel=_GENERATION,
            show_default=False,
        ),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Continue the text, without chat template.", rich_help_panel=_GENERATION
        ),
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(help="New tokens per prompt.", rich_help_panel=_GENERATION)
    ] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token.", rich_help_panel=_GENERATION)
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.", rich_help_panel=_GENERATION)] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.", rich_help_panel=_GENERATION)] = 1.0,
    seed: Annotated[int, typer.Option(rich_help_panel=_GENERATION)] = 0,
    tensor_parallel_size: o.ShardedTensorParallelSize = None,
    max_model_len: o.MaxModelLen = None,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxNumBatchedTokens = None,
    gpu_memory_utilization: o.GpuMemoryUtilization = None,
    kv_cache_memory_bytes: o.KvCacheMemoryBytes = None,
    block_size: o.BlockSize = None,
    dtype: o.Dtype = "auto",
    load_format: Annotated[
        str, typer.Option(help="auto, or dummy for random weights from config.json alone.")
    ] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Only load, execute the worst step, and compare.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(help="Percent by which memory may differ from the plan.")
    ] = 10.0,
    revision: o.Revision = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Load, allocate and execute what the plan says; generate text; compare memory.

    Exit code 4 means that planned and measured memory differ by more than the tolerance.

    Example: tightfit run ./Qwen3-8B-tp2 --prompt "Why is the sky blue?"
    """
    require_runtime("run", "runtime")
    if load_format not in ("auto", "dummy"):
        raise UsageError(f"unknown --load-format {load_format!r}", hint="auto or dummy")
    if not 0 < tolerance < 100:
        raise UsageError(f"--tolerance {tolerance} is out of range", hint="a percentage")
    from tightfit.runtime.launch import is_rank, launch_ranks
    from tightfit.runtime.options import SamplingParams

    sampling = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_tokens=max_tokens
    )
    shards = read_shards(model)
    if shards is not None:
        require_runnable(shards, model)
        from tightfit.sharding.proof.headers import require_headers

        require_headers(Path(model), shards)
    size = _world_size(tensor_parallel_size, shards, model)
    wanted = o.plan_options(
        engine="builtin",
        gpu=None,
        gpu_memory=None,
        tensor_parallel_size=size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        block_size=block_size,
        dtype=dtype,
    )
    prompts = () if check else tuple(prompt or ())
    planned = plan_model(
        model,
        wanted,
        revision=revision,
        download=load_format == "auto",
        with_text=bool(prompts),
    )
    _require_weights(planned.checkpoint, shards, load_format)
    if not planned.plan.verdict.fits:
        print(f"does not fit: {planned.plan.verdict.reason}", file=sys.stderr)
        raise typer.Exit(ExitCode.FINDING)
    if size > 1 and not is_rank():
        code = launch_ranks([sys.executable, "-m", "tightfit", *sys.argv[1:]], size)
        if code == ExitCode.INTERRUPTED:
            print("\ninterrupted", file=sys.stderr)
        raise typer.Exit(code)
    job = _Job(
        checkpoint=planned.checkpoint,
        spec=planned.spec,
        plan=planned.plan,
        shards=shards,
        directory=Path(model),
        load_format=load_format,
        prompts=prompts,
        raw=raw,
        streams=not as_json and len(prompts) == 1,
    )
    report = _execute(job, sampling)
    if report is None:
        return
    if not _finish(job, report, tolerance / 100, as_json=as_json, quiet=quiet):
        raise typer.Exit(ExitCode.MISMATCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    checkpoint: Checkpoint
    spec: ModelSpec
    plan: Plan
    shards: "Manifest | None"
    directory: Path
    load_format: str
    prompts: tuple[str, ...]
    raw: bool
    streams: bool


def require_runtime(command: str, extra: str) -> None:
    """Say what to install if the runtime's packages are missing.

    Raises:
        MissingExtraError: one of them is.
    """
    for package in ("torch", "tokenizers", "jinja2", "numpy"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(command, extra, package)


def _world_size(asked: int | None, shards: "Manifest | None", model: str) -> int:
    """Ranks: those of torchrun, of the shards, or of the option, which must agree."""
    started = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    if asked is not None and started is not None and asked != started:
        raise UsageError(
            f"--tensor-parallel-size {asked}, but torchrun started {started} ranks",
            hint=f"use torchrun --nproc-per-node {asked}",
        )
    return shard_size(asked or started, shards, model)


def _require_weights(checkpoint: Checkpoint, shards: "Manifest | None", load_format: str) -> None:
    from tightfit.checkpoint.describe import require_weights

    if load_format == "auto" and shards is None:
        require_weights(checkpoint, "run")


def _execute(job: _Job, sampling: "SamplingParams") -> "RunReport | None":
    """Run this process's rank; only rank 0 speaks."""
    from tightfit.runtime.dist import World
    from tightfit.runtime.options import EngineOptions
    from tightfit.runtime.session import run_rank

    options = job.plan.options
    blocks = job.plan.kv_cache.num_blocks
    assert blocks is not None, "a plan that fits has blocks"
    rank = int(os.environ.get("RANK", 0))
    try:
        world = World.from_environment()
        try:
            return run_rank(
                job.checkpoint,
                job.spec,
                EngineOptions(
                    dtype=options.dtype.value,
                    max_model_len=options.max_model_len.value,
                    max_num_seqs=options.max_num_seqs.value,
                    max_num_batched_tokens=options.max_num_batched_tokens.value,
                    block_size=options.block_size.value,
                    num_blocks=blocks,
                ),
                world=world,
                prompts=_prompts(job),
                sampling=sampling,
                rank_files=_rank_files(job, rank),
                layout=job.shards.layout if job.shards else "builtin",
                load_format=job.load_format,
                on_text=_print_text if job.streams else None,
            )
        finally:
            world.close()
    except TightfitError as error:
        if rank == 0:
            raise
        raise typer.Exit(error.exit_code) from None


def _prompts(job: _Job) -> list[str | list[dict[str, str]]]:
    if job.raw or not _has_chat_template(job.checkpoint):
        return list(job.prompts)
    return [[{"role": "user", "content": text}] for text in job.prompts]


def _has_chat_template(checkpoint: Checkpoint) -> bool:
    source = checkpoint.source
    if source.exists("chat_template.jinja") or source.exists("chat_template.json"):
        return True
    if not source.exists("tokenizer_config.json"):
        return False
    try:
        return bool(json.loads(source.read("tokenizer_config.json")).get("chat_template"))
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"tokenizer_config.json in {source.label} is not a JSON object ({error})",
            hint="download it again",
        ) from None


def _rank_files(job: _Job, rank: int) -> list[Path] | None:
    if job.shards is None:
        return None
    return [job.directory / file.name for file in job.shards.rank_files(rank)]


def _print_text(_: int, text: str) -> None:
    print(text, end="", flush=True)


def _finish(
    job: _Job, report: "RunReport", tolerance: float, *, as_json: bool, quiet: bool
) -> bool:
    """Show everything; False if memory differs from the plan."""
    from tightfit.runtime.checks import compare, with_measured

    plan = with_measured(job.plan, {rank.rank: rank.components for rank in report.ranks})
    resident = {rank.rank: rank.resident_bytes for rank in report.ranks}
    checks = compare(plan, resident, tolerance)
    if as_json:
        print_json(_document(job, plan, report, checks))
    else:
        if job.streams:
            print()
        for text, completion in zip(job.prompts, report.completions, strict=True):
            if not job.streams:
                print(f"> {text}\n{completion.text}\n")
        if not quiet:
            from tightfit.cli.render import render_checks

            render_checks(plan, checks, console())
            print(_summary(report))
    return all(check.ok for check in checks)


def _document(
    job: _Job, plan: Plan, report: "RunReport", checks: "tuple[Check, ...]"
) -> dict[str, object]:
    return plan.to_json() | {
        "checks": [check.to_json() for check in checks],
        "completions": [
            {
                "prompt": text,
                "text": completion.text,
                "token_ids": completion.token_ids,
                "prompt_tokens": completion.prompt_tokens,
                "finish_reason": completion.finish_reason,
            }
            for text, completion in zip(job.prompts, report.completions, strict=True)
        ],
        "load_seconds": report.load_seconds,
        "generation_seconds": report.generation_seconds,
        "num_preemptions": report.num_preemptions,
        "quantized_layers": dict(report.executions),
    }


def _summary(report: "RunReport") -> str:
    tokens = sum(len(completion.token_ids) for completion in report.completions)
    loaded = f"ready after {report.load_seconds:.1f} s"
    if report.executions:
        how = ", ".join(f"{count} {name}" for name, count in report.executions.items())
        loaded = f"quantized layers: {how}\n{loaded}"
    if not tokens:
        return loaded
    rate = tokens / max(report.generation_seconds, 1e-9)
    return f"{loaded}; {tokens} tokens in {report.generation_seconds:.1f} s ({rate:.0f} per second)"
