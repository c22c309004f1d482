"""`tightfit plan`: what a model will need, line by line, before renting anything."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tightfit.cli import options as o
from tightfit.cli.answers import Answers
from tightfit.cli.ci import read_output, read_threshold
from tightfit.cli.output import console, guarded, note, print_json, warn
from tightfit.cli.plan_request import read_request, with_recipe
from tightfit.cli.shards import options_of_shards, read_shards, require_one_layout
from tightfit.errors import UsageError
from tightfit.planner.api import open_model
from tightfit.planner.plan import SCHEMA

_QUESTIONS = "Questions"
_CI = "For CI"
_ELSEWHERE = "From and to vLLM"


@guarded
@o.takes_options(o.FLAGS)
def plan(
    context: typer.Context,
    model: o.OptionalModel = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            rich_help_panel=_QUESTIONS,
            help="Find the most that fits: the longest context; with --max-model-len the most "
            "sequences; without --gpu the smallest GPUs.",
        ),
    ] = False,
    advise: Annotated[
        bool,
        typer.Option(
            "--advise", rich_help_panel=_QUESTIONS, help="Rank what helps, with what it saves."
        ),
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2,...",
            rich_help_panel=_QUESTIONS,
            help="Plan every value of an option; may be repeated.",
            show_default=False,
        ),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="COMPONENT",
            rich_help_panel=_QUESTIONS,
            help="Print how a component, or `all`, was computed.",
            show_default=False,
        ),
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="OLD.json NEW.json",
            rich_help_panel=_QUESTIONS,
            help="Compare two plans made with --json.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_QUESTIONS,
            help="Also write a page (.html) or a picture (.svg, .png).",
            show_default=False,
        ),
    ] = None,
    fail_under_headroom: Annotated[
        str | None,
        typer.Option(
            metavar="5%|2GiB",
            rich_help_panel=_CI,
            help="Exit with 1 if less KV memory is left beyond one sequence of max_model_len on "
            "the tightest rank: a share of the device, or bytes.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str, typer.Option(rich_help_panel=_CI, help="human, json, junit[:FILE] or github.")
    ] = "human",
    from_command: Annotated[
        str | None,
        typer.Option(
            metavar='"vllm serve ..."',
            rich_help_panel=_ELSEWHERE,
            help="Take model and options from a command; flags of this one win.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_ELSEWHERE, help="Take them from vLLM's YAML.", show_default=False
        ),
    ] = None,
    from_log: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_ELSEWHERE,
            help="Show planned beside what a start-up log of vLLM says.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            rich_help_panel=_ELSEWHERE,
            help="With --from-log: keep what it teaches for later plans of such start-ups.",
        ),
    ] = False,
    emit: Annotated[
        str | None,
        typer.Option(
            metavar="vllm|compose|k8s",
            rich_help_panel=_ELSEWHERE,
            help="Print what starts it as planned.",
            show_default=False,
        ),
    ] = None,
    quantization_recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Memory",
            help="Plan what `quantize --recipe` writes.",
            show_default=False,
        ),
    ] = None,
    quantization_ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX",
            rich_help_panel="Memory",
            help="Modules that `quantize` leaves as they are; repeatable.",
            show_default=False,
        ),
    ] = None,
    revision: o.Revision = None,
    as_json: o.Json = False,
    **asked: Any,
) -> None:
    """Predict the memory of every rank, and say whether it fits.

    Needs no GPU and downloads no weights: of a Hub id it reads the config and the headers.

    Example: tightfit plan Qwen/Qwen3-8B --gpu rtx4090 --max-model-len 16K --advise
    """
    if diff is not None:
        _compare(diff, as_json=as_json)
        return
    if asked["gpu"] == "list":
        _catalogue(as_json=as_json)
        return
    if model is None and from_command is None and config is None and from_log is None:
        context.fail("Missing argument 'MODEL'.")
    if calibrate and from_log is None:
        context.fail("--calibrate learns from a log: give --from-log too.")
    alone = {"--sweep": sweep, "--explain": explain, "--emit": emit}
    _refuse_together(
        {name: bool(value) for name, value in alone.items()},
        {"--fit": fit and bool(sweep), "--advise": advise, "--from-log": from_log is not None},
    )
    form, file = read_output("json" if as_json else output)
    threshold = None if fail_under_headroom is None else read_threshold(fail_under_headroom)
    if report is not None:
        from tightfit.cli.report import check_suffix

        check_suffix(report)
    request = read_request(
        model,
        asked,
        revision=revision,
        from_command=from_command,
        config=config,
        from_log=from_log,
    )
    for text in request.warnings:
        warn(text)
    asked = with_recipe(request.asked, quantization_recipe, quantization_ignore or ())
    size = asked.get("tensor_parallel_size")
    shards = read_shards(request.model)
    if shards is not None:
        require_one_layout(sweep or (), request.model)
    wanted = options_of_shards(asked, shards, request.model)
    opened = open_model(request.model, revision=request.revision)
    answers = Answers(
        opened=opened,
        form=form,
        file=file,
        threshold=threshold,
        report=report,
        advised=advise,
        log=request.log,
    )
    if sweep:
        raise typer.Exit(answers.sweep(sweep, wanted))
    options = o.plan_options(**wanted)
    fitted = None
    if fit:
        from tightfit.planner.fit import SIZES
        from tightfit.planner.fit import fit as find_fit

        sizes = SIZES if size is None and shards is None else (options.tensor_parallel_size,)
        fitted = find_fit(options, opened.plan, sizes=sizes)
        options = fitted.options
    result = opened.plan(options) if fitted is None else fitted.plan
    if explain is not None:
        answers.explanation(result, options, explain)
        return
    if advise:
        from tightfit.planner.advice import advise as remedies

        result = replace(result, advice=remedies(result, options, opened.plan))
    if emit is not None:
        answers.command(result, options, request.model, emit)
        return
    code = answers.plan(result, options, fitted)
    if request.log is not None and from_log is not None and calibrate:
        from tightfit.cli.log_view import remember

        note(remember(opened.plan(options, corrected=False), request.log, from_log))
    raise typer.Exit(code)


def _refuse_together(alone: Mapping[str, bool], others: Mapping[str, bool]) -> None:
    """Some questions have an answer of their own, beside which no other can be printed."""
    given = [name for name, value in alone.items() if value]
    more = given[1:] + [name for name, value in others.items() if value]
    if given and more:
        raise UsageError(
            f"{given[0]} and {more[0]} cannot be answered together", hint="ask one after the other"
        )


def _catalogue(*, as_json: bool) -> None:
    from tightfit.planner.devices import CATALOGUE

    if as_json:
        print_json({"schema": SCHEMA, "gpus": [asdict(one) for one in CATALOGUE.values()]})
        return
    from tightfit.cli.tables import render_catalogue

    render_catalogue(list(CATALOGUE.values()), console())


def _compare(paths: tuple[Path, Path], *, as_json: bool) -> None:
    from tightfit.planner.diff import diff, read_plan

    old, new = (read_plan(path) for path in paths)
    difference = diff(old, new)
    if as_json:
        print_json(difference.to_json())
        return
    from tightfit.cli.tables import render_difference

    render_difference(difference, console())
