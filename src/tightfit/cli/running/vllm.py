"""`tightfit run --engine vllm`: a real vLLM with the planned options, and planned beside logged."""

import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.cli import options as o
from tightfit.cli.log_view import log_json, remember
from tightfit.cli.output import console, note, one_line, print_json, until_closed, warn
from tightfit.cli.running.generate import has_chat_template
from tightfit.cli.running.job import require_fit
from tightfit.cli.shards import options_of_shards, read_shards
from tightfit.errors import ExitCode, UsageError
from tightfit.planner.api import OpenedModel, open_model
from tightfit.planner.devices import Device, named, this_machine
from tightfit.planner.emit import emit
from tightfit.planner.nvml import visible_gpus
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.planner.vllm_log import VLLMLog, mismatches, read_log
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.vllm.checks import checks_of
from tightfit.runtime.vllm.server import Installed, VLLMServer, installed, vllm_server
from tightfit.sharding.proof.vllm_load import find_interpreter

if TYPE_CHECKING:
    from tightfit.runtime.checks import Check

_ENVIRONMENT = {
    # Some versions print what they measured only then.
    "VLLM_LOGGING_LEVEL": "DEBUG",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting:
    """How vLLM is started; the defaults are those of the command line."""

    vllm_python: str | None = None
    vllm_log: Path | None = None
    startup_timeout: float = 1800.0
    store_calibration: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What vLLM is asked once it is ready."""

    prompts: Sequence[str]
    raw: bool
    sampling: SamplingParams


def run_vllm(
    model: str,
    given: Mapping[str, Any],
    starting: Starting,
    asked: Asked,
    *,
    device: str,
    revision: str | None,
    tolerance: float | None,
    as_json: bool,
    quiet: bool,
) -> ExitCode:
    """Plan, start, compare, stop.

    Returns:
        0, or 4 if what was logged differs from the plan.

    Raises:
        UsageError: there is no vLLM, or it cannot be started so.
        RankFailedError: vLLM did not get ready.
    """
    found = installed(find_interpreter(starting.vllm_python, "--vllm-python"))
    wanted = options_of_shards(given, read_shards(model), model)
    wanted = {"engine_version": _release(found.version), **wanted, "engine": "vllm"}
    options = o.plan_options(**wanted)
    if options.device is None:
        options = replace(options, device=local_device(device, found))
    opened = open_model(model, revision=revision)
    plan = opened.plan(options)
    require_fit(plan)
    environment, arguments = command_of(plan, options, model, revision)
    chat = not asked.raw and bool(asked.prompts) and has_chat_template(opened.checkpoint)
    if not quiet:
        words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        note(" ".join([*words, "vllm serve", shlex.join(arguments)]))
    with _log(starting.vllm_log) as log_file:
        with vllm_server(
            arguments,
            python=found.python,
            environment=_ENVIRONMENT | environment,
            log=log_file,
            timeout_seconds=starting.startup_timeout,
            heard=_silent if quiet or as_json else _tell,
        ) as server:
            completions = _ask(server, asked, chat=chat)
            ready_seconds = server.ready_seconds
        log = read_log(log_file)
        checks = checks_of(plan, log, tolerance)
        for text in mismatches(plan, log):
            warn(f"not comparable: {text}")
        if as_json:
            print_json(_document(plan, log, checks, completions, ready_seconds))
        else:
            with until_closed():
                _render(plan, log, checks, completions, ready_seconds, quiet=quiet)
        if starting.store_calibration:
            note(_remember(opened, options, log, log_file))
    return ExitCode.OK if all(check.ok for check in checks) else ExitCode.MISMATCH


def local_device(word: str, found: Installed) -> Device:
    """Where that vLLM will run: a GPU of this machine, or its memory.

    Raises:
        UsageError: another word, or no GPU.
    """
    if word not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown --device {word!r}", hint="auto, cpu or cuda")
    gpus = visible_gpus()
    if word == "cpu" or found.for_cpus:
        return this_machine()
    if not gpus:
        raise UsageError(
            "no GPU is visible, and this vLLM is not built for CPUs",
            hint="check nvidia-smi and CUDA_VISIBLE_DEVICES, or give --vllm-python",
        )
    smallest = min(gpus, key=lambda gpu: gpu.total_bytes)
    try:
        # The catalogue's name, so that plans elsewhere find what is learnt here.
        return replace(named(smallest.name), total_bytes=smallest.total_bytes)
    except UsageError:
        return smallest.device()


def command_of(
    plan: Plan, options: PlanOptions, model: str, revision: str | None
) -> tuple[dict[str, str], list[str]]:
    """The variables and the arguments of the command that `plan --emit vllm` prints.

    The pool is not pinned: vLLM shall measure what it leaves, as the plan has.

    Raises:
        UsageError: the checkpoint has to be quantized first.
    """
    text = emit(plan, model, "vllm", pin_kv_cache=False, options=options)
    if text.startswith("#"):
        raise UsageError(
            "the plan is of a checkpoint that is still to be quantized",
            hint=text.splitlines()[0].removeprefix("# First: "),
        )
    words = shlex.split(text.replace("\\\n", " "))
    start = words.index("serve")
    environment = dict(word.split("=", 1) for word in words[: start - 1])
    arguments = words[start + 1 :]
    return environment, arguments + (["--revision", revision] if revision else [])


def _release(version: str) -> str:
    """Without what a build adds: `0.25.1+cpu` is planned as 0.25.1."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return match[0] if match else version


@contextmanager
def _log(kept: Path | None) -> Iterator[Path]:
    """A path for the log, which is removed at the end unless it was asked for."""
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="tightfit-vllm-") as directory:
        yield Path(directory) / "vllm.log"


def _silent(_: str) -> None:
    pass


def _tell(line: str) -> None:
    if "DEBUG" not in line:
        print(one_line(line), file=sys.stderr)


def _ask(server: VLLMServer, asked: Asked, *, chat: bool) -> list[dict[str, Any]]:
    names = ("temperature", "top_k", "top_p", "seed", "max_tokens")
    sampling = {name: getattr(asked.sampling, name) for name in names}
    return [server.ask(text, chat=chat, sampling=sampling) for text in asked.prompts]


def _document(
    plan: Plan,
    log: VLLMLog,
    checks: "tuple[Check, ...]",
    completions: list[dict[str, Any]],
    ready_seconds: float,
) -> dict[str, Any]:
    return plan.to_json() | {
        "checks": [check.to_json() for check in checks],
        "log": log_json(plan, log),
        "completions": completions,
        "load_seconds": ready_seconds,
    }


def _render(
    plan: Plan,
    log: VLLMLog,
    checks: "tuple[Check, ...]",
    completions: list[dict[str, Any]],
    ready_seconds: float,
    *,
    quiet: bool,
) -> None:
    for one in completions:
        print(f"> {one['prompt']}\n{one['text']}\n")
    if quiet:
        return
    from tightfit.cli.render import render_checks

    render_checks(plan, checks, console())
    tokens = log.number("kv_tokens")
    pool = "" if tokens is None else f"; the KV cache holds {tokens:,.0f} tokens"
    if tokens is not None and plan.kv_cache.tokens is not None:
        pool += f", planned {plan.kv_cache.tokens:,}"
    print(f"vLLM {log.version or plan.engine_version} ready after {ready_seconds:.1f} s{pool}")


def _remember(opened: OpenedModel, options: PlanOptions, log: VLLMLog, source: Path) -> str:
    return remember(opened.plan(options, corrected=False), log, source)
