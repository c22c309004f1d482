"""`tightfit quantize`: fp8, int8, int4 and fp4 checkpoints, without a GPU."""

from pathlib import Path
from typing import Annotated

import typer

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.source import is_remote
from tightfit.cli import options as o
from tightfit.cli import quantize_request as request
from tightfit.cli.options import quantization as q
from tightfit.cli.options import writing as w
from tightfit.cli.output import guarded, print_json, progress, warn
from tightfit.errors import ExitCode, UsageError
from tightfit.executors import open_executor
from tightfit.model.quantization.written import SCHEMES
from tightfit.quantize.recipe_file import METHODS
from tightfit.sharding.side_files import left_behind
from tightfit.units import parse_bytes

_CALIBRATION = "Calibration"
_QUALITY = "Quality"


@guarded
def quantize(
    model: o.Model,
    out: w.Out,
    scheme: Annotated[
        str | None,
        # With its name: typer 0.27.2 takes a metavar that differs only in case for the name.
        typer.Option(
            "--scheme",
            metavar="SCHEME",
            help=", ".join(SCHEMES),
            rich_help_panel=q.PANEL,
            show_default=False,
        ),
    ] = None,
    group_size: q.GroupSize = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="|".join(METHODS),
            help="How values are chosen: nearest, least error, or with calibration.",
            rich_help_panel=q.PANEL,
        ),
    ] = "rtn",
    file_format: q.FileFormat = None,
    recipe: q.Recipe = None,
    ignore: q.Ignore = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            metavar="fp8",
            help="Scales for keys and values.",
            rich_help_panel=q.PANEL,
            show_default=False,
        ),
    ] = None,
    for_tp: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Refuse what N tensor parallel ranks could not load.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help=".txt, or .jsonl with a `text` in each line; repeatable.",
            rich_help_panel=_CALIBRATION,
            show_default=False,
        ),
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option(help="Windows of text.", rich_help_panel=_CALIBRATION)
    ] = 128,
    calibration_length: Annotated[
        int, typer.Option(help="Tokens of each.", rich_help_panel=_CALIBRATION)
    ] = 512,
    seed: Annotated[int, typer.Option(help="Which ones.", rich_help_panel=_CALIBRATION)] = 0,
    backend: Annotated[
        str,
        typer.Option(
            metavar="|".join(request.BACKENDS),
            help="Who computes gptq; optimum holds the whole model in memory.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = "own",
    max_shard_size: w.MaxShardSize = "5GB",
    resume: w.Resume = False,
    dry_run: w.DryRun = False,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Take a MODEL that is quantized already."),
    ] = False,
    executor: w.ExecutorName = "local",
    ray_address: w.RayAddress = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXTFILE",
            help="Perplexity of a text before and after.",
            rich_help_panel=_QUALITY,
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Errors of every matrix as a page, which --dry-run writes too.",
            rich_help_panel=_QUALITY,
            show_default=False,
        ),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity", help="Rank layers by what it does to them.", rich_help_panel=_QUALITY
        ),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Find the recipe that comes to at most this (6GiB).",
            rich_help_panel=_QUALITY,
            show_default=False,
        ),
    ] = None,
    revision: o.Revision = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Quantize a checkpoint tensor by tensor, in bounded memory, without a GPU.

    vLLM and transformers load the result as they load any checkpoint.

    Example: tightfit quantize ./Qwen3-8B ./Qwen3-8B-fp8 --scheme fp8-channel
    """
    w.check_out(out)
    size = w.shard_bytes(max_shard_size)
    if for_tp is not None and not 1 <= for_tp <= 1024:
        raise UsageError(f"--for-tp {for_tp} is out of range", hint="at least 1")
    if executor != "local" and is_remote(out):
        raise UsageError(
            f"--executor {executor} writes to a shared directory, and not to {out}",
            hint="leave out --executor",
        )
    request.check_method(method, backend)
    request.check_backend(backend, dequantize=dequantize)
    request.check_samples(calibration_samples, calibration_length)
    if report is not None:
        request.check_report(report, out, dry_run=dry_run)
    patterns = tuple(ignore or ())
    wish = None
    if budget is not None:
        flags = {"--scheme": scheme, "--recipe": recipe, "--group-size": group_size}
        flags |= {"--format": file_format, "--kv-cache": kv_cache}
        request.check_budget(budget, method, backend, flags)
    request.require_packages()
    if budget is None:
        wish = request.wish_from(
            recipe,
            scheme=scheme,
            group_size=group_size,
            file_format=file_format,
            kv_cache=kv_cache,
            ignore=patterns,
        )
    from tightfit.cli import quantize_view as view
    from tightfit.cli.quantize_steps import Asked, carry_out
    from tightfit.quantize.admission import RefusedError

    asked = Asked(
        out=out,
        method=method,
        backend=backend,
        for_tp=for_tp,
        max_shard_bytes=size,
        resume=resume,
        dry_run=dry_run,
        quiet=quiet,
        evaluate=evaluate,
        report=report,
        sensitivity=sensitivity,
        budget_bytes=None if budget is None else parse_bytes(budget),
        ignored=patterns,
        texts=tuple(calibration or ()),
        samples=calibration_samples,
        length=calibration_length,
        seed=seed,
    )
    reads_all = asked.calibration(wish) is not None
    if dry_run and budget is None and not sensitivity:
        reads_all = False
    checkpoint = open_checkpoint(
        model, revision=revision, download=reads_all or not (dry_run or is_remote(out))
    )
    for text in left_behind(checkpoint):
        warn(text)
    if dequantize:
        from tightfit.quantize.dequantize import open_dequantized

        checkpoint = open_dequantized(checkpoint)
    try:
        with (
            open_executor(executor, "quantize", ray_address=ray_address, notice=warn) as spread,
            progress(quiet=quiet) as bars,
        ):
            done = carry_out(checkpoint, wish, asked, spread, bars)
    except RefusedError as error:
        if not dry_run:
            raise
        if as_json:
            print_json(view.refused(error, checkpoint.name, out))
        else:
            view.show_refusals(error)
        raise typer.Exit(ExitCode.INPUT) from None
    if as_json:
        print_json(view.document(done, asked))
    elif dry_run or not quiet or asked.evaluate is not None or sensitivity:
        view.show(done, asked)
