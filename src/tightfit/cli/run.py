"""`tightfit run`: execute the plan with the builtin runtime, and print what it really took."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import typer

from tightfit.cli import options as o
from tightfit.cli.output import guarded
from tightfit.cli.running.job import TAKEN, launch_other_ranks, prepare, require_runtime
from tightfit.errors import UsageError

__all__ = ["require_runtime", "run"]

_GENERATION = "Generation"
_OURS = {name: flag for name, flag in o.FLAGS.items() if name in TAKEN}
_VLLMS = {name: flag for name, flag in o.FLAGS.items() if name not in TAKEN}


@guarded
@o.takes_options(
    _OURS, o.SERVING, o.BENCHING, o.in_panel(o.starting.PANEL, {**o.STARTING, **_VLLMS})
)
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
    check: Annotated[
        bool, typer.Option("--check", help="Only load, execute the worst step, and compare.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Percent by which memory may differ from the plan; 10 on a CPU, 3 on a GPU.",
            show_default=False,
        ),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="An OpenAI-compatible endpoint, until Ctrl-C.")
    ] = False,
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure throughput and latency under a load.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="builtin, or vllm: start an installed vLLM as planned.")
    ] = "builtin",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    model_impl: Annotated[
        str,
        typer.Option(
            help="Whose code executes the model: builtin, transformers, or auto for the first that "
            "can."
        ),
    ] = "auto",
    attention_backend: Annotated[
        str,
        typer.Option(help="On GPUs: triton, flash-attn or torch, or auto for the fastest."),
    ] = "auto",
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Sequences that begin alike share their KV cache.",
            show_default="on",
        ),
    ] = True,
    revision: o.Revision = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
    **asked: Any,
) -> None:
    """Load, allocate and execute what the plan says; generate text; compare memory.

    Exit code 4 means that planned and measured memory differ by more than the tolerance.

    Example: tightfit run ./Qwen3-8B-tp2 --prompt "Why is the sky blue?"
    """
    given = {name: value for name, value in asked.items() if value is not None}
    given["model_impl"] = model_impl
    if engine not in ("builtin", "vllm"):
        raise UsageError(f"unknown --engine {engine!r}", hint="builtin or vllm")
    if tolerance is not None and not 0 < tolerance < 100:
        raise UsageError(f"--tolerance {tolerance} is out of range", hint="a percentage")
    _refuse(("--serve", serve), ("--bench", bench), ("--prompt", bool(prompt)), ("--check", check))
    _refuse(("--serve", serve), ("--json", as_json))
    serving = _of_group(given, o.SERVING, "--serve", serve)
    benching = _of_group(given, o.BENCHING, "--bench", bench)
    starting = _of_group(given, o.STARTING, "--engine vllm", engine == "vllm")
    from tightfit.runtime.options import SamplingParams

    sampling = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_tokens=max_tokens
    )
    prompts = () if check else tuple(prompt or ())
    allowed = None if tolerance is None else tolerance / 100
    if engine == "vllm":
        _refuse(("--engine vllm", True), ("--serve", serve), ("--bench", bench))
        from tightfit.cli.running.vllm import Asked, Starting, run_vllm

        code = run_vllm(
            model,
            given,
            Starting(**starting),
            Asked(prompts=prompts, raw=raw, sampling=sampling),
            device=device,
            revision=revision,
            tolerance=allowed,
            as_json=as_json,
            quiet=quiet,
        )
        raise typer.Exit(code)
    require_runtime("run", "runtime")
    planned = partial(
        prepare,
        model,
        given,
        device=device,
        revision=revision,
        attention_backend=attention_backend,
        enable_prefix_caching=enable_prefix_caching,
    )
    if serve:
        from tightfit.cli.running.serve import read_serving
        from tightfit.cli.running.serve import serve as serve_job

        how = read_serving(serving)
        raise typer.Exit(serve_job(planned(with_text=True), how))
    if bench:
        from tightfit.cli.running.bench import bench as bench_job
        from tightfit.cli.running.bench import read_load

        load, report = read_load(benching, seed=seed), benching.get("report")
        job = planned(with_text=False)
        raise typer.Exit(bench_job(job, load, report=report, as_json=as_json, quiet=quiet))
    from tightfit.cli.running.generate import generate

    job = planned(with_text=bool(prompts))
    launch_other_ranks(job)
    code = generate(
        job,
        prompts,
        sampling,
        raw=raw,
        tolerance=allowed,
        as_json=as_json,
        quiet=quiet,
    )
    raise typer.Exit(code)


def _refuse(*ways: tuple[str, bool]) -> None:
    """Several ways of running at once."""
    given = [name for name, value in ways if value]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} exclude each other", hint="leave one out")


def _of_group(
    given: dict[str, Any], group: Mapping[str, Any], way: str, chosen: bool
) -> dict[str, Any]:
    """Take the options of one way of running out of all that were given."""
    found = {name: given.pop(name) for name in group if name in given}
    if found and not chosen:
        name = next(iter(found)).replace("_", "-")
        raise UsageError(f"--{name} is an option of {way}", hint=f"add {way}, or leave it out")
    return found
