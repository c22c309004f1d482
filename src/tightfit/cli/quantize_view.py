"""What `quantize` prints: sizes before and after, refusals, and how to serve the result."""

import shlex
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from tightfit.checkpoint.source import is_remote
from tightfit.cli.output import console, one_line
from tightfit.quantize.admission import RefusedError
from tightfit.quantize.job import QuantizeJob
from tightfit.quantize.recipe_file import document_of
from tightfit.quantize.summary import Sizes, summarize
from tightfit.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from tightfit.cli.quantize_steps import Asked, Done
    from tightfit.quantize.evaluate import Perplexity

_MOST_KEPT = 8


def document(done: "Done", asked: "Asked") -> dict[str, Any]:
    """The document of `--json`."""
    job, summary = done.job, summarize(done.job)
    return {
        "schema": 1,
        "model": job.checkpoint.name,
        "output": asked.out,
        "written": done.fresh,
        "method": job.method,
        "recipe": document_of(job.wish),
        "total_bytes": done.files.output_bytes,
        "sizes": {
            "total": asdict(summary.total),
            **{kind: asdict(one) for kind, one in summary.kinds.items()},
        },
        "kept": list(summary.kept),
        "files": [
            {"name": part.name, "nbytes": part.nbytes, "tensors": len(part.placed)}
            for part in done.files.parts
        ],
        "refusals": [],
        "budget": None if done.budget is None else done.budget.to_json(),
        "quality": None if done.quality is None else done.quality.to_json(),
        "perplexity": None
        if done.perplexity is None
        else dict(zip(("before", "after"), map(_perplexity, done.perplexity), strict=True)),
        "sensitivity": None if done.sensitivity is None else done.sensitivity.to_json(),
    }


def refused(error: RefusedError, model: str, out: str) -> dict[str, Any]:
    """The document of a job that cannot be carried out."""
    refusals = [{**asdict(one), "modules": list(one.modules)} for one in error.refusals]
    return {
        "schema": 1,
        "model": model,
        "output": out,
        "written": False,
        "refusals": refusals,
        "remedy": error.remedy,
    }


def show_refusals(error: RefusedError) -> None:
    """One line for each, one that says what would do for it, and one for all of them at once."""
    for one in error.refusals:
        print(one_line(f"refused: {one} ({one.matrices:,} matrices, {one.scheme})"))
        print(one_line(f"  {one.remedy}"))
    if len(error.refusals) > 1:
        print(one_line(f"for all of these: {error.remedy}"))


def show(done: "Done", asked: "Asked") -> None:
    """What was found, sizes, what stays as it is, and the command that serves the result."""
    from rich.table import Table

    job, summary, page = done.job, summarize(done.job), console()
    if done.budget is not None or done.quality is not None:
        _show_quality(done, page)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "before", "after", "", "quantized", "kept"):
        table.add_column(name, justify="right" if table.columns else "left")
    for kind, one in (*summary.kinds.items(), ("total", summary.total)):
        table.add_row(kind, *_cells(one))
    page.print(table)
    kept = list(summary.kept[:_MOST_KEPT])
    if kept:
        more = len(summary.kept) - len(kept)
        _line(page, f"kept as they are: {', '.join(kept)}" + (f" and {more} more" if more else ""))
    count = len(done.files.parts)
    what = (
        f"{job.wish.label} ({job.method}), {format_bytes(done.files.output_bytes)} in {count} "
        f"file{'s' if count > 1 else ''}"
    )
    if done.fresh or asked.dry_run:
        _line(page, f"{'wrote' if done.fresh else 'would write'} {what}, to {asked.out}")
    else:
        _line(page, f"{asked.out} holds all of it already, as its checksums prove: {what}")
    if done.perplexity is not None:
        before, after = map(_spread, done.perplexity)
        _line(page, f"perplexity of {asked.evaluate}: {before} before, {after} after")
    if asked.report is not None:
        _line(page, f"wrote the errors of every matrix to {asked.report}")
    if not asked.dry_run:
        _line(page, f"next: {served(job, asked.out, asked.for_tp)}")


def _show_quality(done: "Done", page: "Console") -> None:
    from tightfit.cli.quality_view import render_budget, render_quality, render_sensitivity

    if done.budget is not None:
        render_budget(done.budget, page)
    if done.quality is not None:
        render_quality(done.quality, page)
    if done.sensitivity is not None:
        render_sensitivity(done.sensitivity, page)


def _line(page: "Console", text: str) -> None:
    from rich.text import Text

    page.print(Text(one_line(text)), soft_wrap=True)


def served(job: QuantizeJob, out: str, for_tp: int | None) -> str:
    """The command by which vLLM serves the result."""
    words = ["vllm serve", shlex.quote(out)]
    if is_remote(out):
        # vLLM itself reads local files and the Hub only.
        words.append("--load-format runai_streamer")
    if for_tp is not None and for_tp > 1:
        words.append(f"--tensor-parallel-size {for_tp}")
    if job.wish.kv_cache:
        words.append("--kv-cache-dtype fp8")
    return " ".join(words)


def _spread(one: "Perplexity") -> str:
    spread = f"± {one.error:.3f}" if one.windows > 1 else "of one window, which says little"
    return f"{one.value:.3f} ({spread})"


def _perplexity(one: "Perplexity") -> dict[str, Any]:
    """Numbers that are not finite are no JSON."""
    good = isfinite(one.value)
    return {
        "value": one.value if good else None,
        "error": one.error if good else None,
        "windows": one.windows,
        "tokens": one.tokens,
    }


def _cells(one: Sizes) -> tuple[str, ...]:
    share = f"{one.after_bytes / one.before_bytes:.0%}" if one.before_bytes else ""
    return (
        format_bytes(one.before_bytes),
        format_bytes(one.after_bytes),
        share,
        f"{one.quantized:,}",
        f"{one.kept:,}",
    )
