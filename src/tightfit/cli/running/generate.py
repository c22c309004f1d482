"""`tightfit run --prompt`: answers, and planned beside measured memory."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.cli.output import console, print_json, status
from tightfit.cli.running.job import Job, in_world
from tightfit.errors import ConfigError, ExitCode
from tightfit.planner.plan import Plan
from tightfit.units import format_bytes

if TYPE_CHECKING:
    from tightfit.runtime.checks import Check
    from tightfit.runtime.options import SamplingParams
    from tightfit.runtime.session import RunReport


def generate(
    job: Job,
    prompts: Sequence[str],
    sampling: "SamplingParams",
    *,
    raw: bool,
    tolerance: float | None,
    as_json: bool,
    quiet: bool,
) -> ExitCode:
    """Run this process's rank; only rank 0 speaks. 4 if memory differs from the plan."""
    from tightfit.runtime.session import run_rank

    streams = not as_json and len(prompts) == 1
    try:
        report = in_world(
            job,
            lambda world: run_rank(
                job.checkpoint,
                job.spec,
                job.options,
                world=world,
                prompts=as_asked(job.checkpoint, prompts, raw=raw),
                sampling=sampling,
                on_text=_print_text if streams else None,
                **job.source(world.rank),
            ),
            quiet=quiet,
        )
    except KeyboardInterrupt:
        if streams:
            # The line may have begun.
            print()
        raise
    if report is None:
        return ExitCode.OK
    plan, checks = checked(job.plan, report, tolerance)
    if as_json:
        print_json(_document(prompts, plan, report, checks))
    else:
        if streams:
            print()
        else:
            for text, completion in zip(prompts, report.completions, strict=True):
                print(f"> {text}\n{completion.text}\n")
        if not quiet:
            from tightfit.cli.render import render_checks

            render_checks(plan, checks, console())
            if left := _left(plan, report):
                rank, size = min(left.items(), key=lambda item: item[1])
                print(f"at the tightest moment {format_bytes(size)} were left, on rank {rank}")
            print(_summary(report))
    failed = [check for check in checks if not check.ok]
    for check in failed if quiet else ():
        print(
            f"{check.component} of rank {check.rank}: planned {format_bytes(check.planned_bytes)}, "
            f"measured {format_bytes(check.measured_bytes)}, {format_bytes(check.allowed_bytes)} "
            "apart at most",
            file=sys.stderr,
        )
    return ExitCode.MISMATCH if failed else ExitCode.OK


def checked(
    plan: Plan, report: "RunReport", tolerance: float | None
) -> "tuple[Plan, tuple[Check, ...]]":
    """The plan with what was measured, and a judgement of each difference."""
    from tightfit.runtime.checks import compare, with_measured

    plan = with_measured(plan, {rank.rank: rank.components for rank in report.ranks})
    resident = {rank.rank: rank.resident_bytes for rank in report.ranks}
    return plan, compare(plan, resident, tolerance)


def _left(plan: Plan, report: "RunReport") -> dict[int, int]:
    """Bytes that each rank left of its GPU when it held the most, whatever others hold there."""
    if plan.device is None or plan.device.kind == "cpu":
        return {}
    return {rank.rank: plan.device.total_bytes - rank.resident_bytes for rank in report.ranks}


def as_asked(
    checkpoint: Checkpoint, prompts: Sequence[str], *, raw: bool
) -> list[str | list[dict[str, str]]]:
    """Prompts as texts to continue, or as conversations if the model has a format for those."""
    if raw or not has_chat_template(checkpoint):
        return list(prompts)
    return [[{"role": "user", "content": text}] for text in prompts]


def has_chat_template(checkpoint: Checkpoint) -> bool:
    """Whether the model has a format for conversations.

    Raises:
        ConfigError: tokenizer_config.json is damaged.
    """
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


def _print_text(_: int, text: str) -> None:
    status()
    print(text, end="", flush=True)


def _document(
    prompts: Sequence[str], plan: Plan, report: "RunReport", checks: "tuple[Check, ...]"
) -> dict[str, object]:
    return plan.to_json() | {
        "checks": [check.to_json() for check in checks],
        "left_bytes": {str(rank): size for rank, size in _left(plan, report).items()},
        "completions": [
            {
                "prompt": text,
                "text": completion.text,
                "token_ids": completion.token_ids,
                "prompt_tokens": completion.prompt_tokens,
                "finish_reason": completion.finish_reason,
            }
            for text, completion in zip(prompts, report.completions, strict=True)
        ],
        "load_seconds": report.load_seconds,
        "generation_seconds": report.generation_seconds,
        "num_preemptions": report.num_preemptions,
        "quantized_layers": dict(report.executions),
        "implementation": report.implementation,
        "attention": report.attention,
    }


def _summary(report: "RunReport") -> str:
    tokens = sum(len(completion.token_ids) for completion in report.completions)
    loaded = f"executed by {report.implementation}; ready after {report.load_seconds:.1f} s"
    loaded = "\n".join([*report.attention, loaded])
    if report.executions:
        how = ", ".join(f"{count} {name}" for name, count in report.executions.items())
        loaded = f"quantized layers: {how}\n{loaded}"
    if not tokens:
        return loaded
    rate = tokens / max(report.generation_seconds, 1e-9)
    return f"{loaded}; {tokens} tokens in {report.generation_seconds:.1f} s ({rate:.0f} per second)"
