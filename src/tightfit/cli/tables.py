"""What `plan` prints beside a plan: sweeps, differences, advice, and what fitted."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tightfit.planner.devices import Device
from tightfit.planner.diff import Change, Difference
from tightfit.planner.fit import Fitted
from tightfit.planner.headroom import spare_bytes
from tightfit.planner.plan import Plan
from tightfit.planner.sweep import Point, Sweep
from tightfit.units import GiB, format_bytes

_SHOWN = 12
_ANY = 10_000
"""Columns of a page without end."""
_PAGE = 60
"""Columns that figures need."""


def _plain() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))


def render_sweep(result: Sweep, console: Console) -> None:
    """One row per point; one that cannot be says why."""
    table = _sweep_table(result)
    if console.measure(table, options=console.options.update(max_width=_ANY)).maximum > (
        console.width
    ):
        table = _sweep_table(result, narrow=True, whole=console.width >= _PAGE)
    # A reason is a sentence: it gets a line of its own, not a column as wide.
    reasons: dict[str, list[int]] = {}
    for number, point in enumerate(result.points, 1):
        if point.error is not None:
            reasons.setdefault(point.error.message, []).append(number)
    console.print(table)
    for message, numbers in reasons.items():
        console.print(Text(f"cannot be ({_rows(numbers)}): {message}", style="yellow"))


def _sweep_table(result: Sweep, *, narrow: bool = False, whole: bool = True) -> Table:
    """Names of columns are broken where the page is narrow, and if need be figures as well.

    Args:
        result: what there is to show.
        narrow: break names.
        whole: but no figures.
    """
    table = _plain()
    for axis in result.axes:
        table.add_column(axis.name.replace("_", "_\n") if narrow else axis.name, overflow="fold")
    table.add_column("fits", overflow="fold")
    for name in ("KV tokens", "concurrency", "spare GiB", "longest"):
        name = name.replace(" ", "\n") if narrow else name
        table.add_column(name, justify="right", no_wrap=whole, overflow="fold")
    for point in result.points:
        table.add_row(*(_value(value) for value in point.options.values()), *_outcome(point))
    return table


def _rows(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")
    return f"row {shown}" if len(numbers) == 1 else f"rows {shown}"


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    return f"{value:,}"


def _outcome(point: Point) -> list[str | Text]:
    plan = point.plan
    if plan is None:
        return [Text("cannot be", style="yellow"), "", "", "", ""]
    kv, longest = plan.kv_cache, plan.verdict.max_model_len_that_fits
    words = {True: Text("yes", "green"), False: Text("no", "bold red"), None: Text("?")}
    return [
        words[plan.verdict.fits],
        "" if kv.tokens is None else f"{kv.tokens:,}",
        "" if kv.max_concurrency is None else f"{kv.max_concurrency:.2f}",
        "" if plan.device is None else f"{spare_bytes(plan) / GiB:,.2f}",
        "" if longest is None else f"{longest:,}",
    ]


def render_advice(plan: Plan, console: Console) -> None:
    """Every remedy with what it saves, whether it suffices, and what it costs."""
    console.print()
    if not plan.advice:
        console.print("No single change that is modelled helps.")
        return
    short = plan.verdict.fits is False
    console.print(Text("What helps, each change alone", style="bold"))
    table = _plain()
    if short:
        table.add_column("then it")
    table.add_column("saves", justify="right", no_wrap=True)
    table.add_column("change", overflow="fold")
    table.add_column("costs", style="dim", overflow="fold")
    for advice in plan.advice:
        row: list[str | Text] = [
            format_bytes(advice.saves_bytes),
            Text(advice.change),
            Text(advice.costs),
        ]
        if short:
            fits = Text("fits", "green") if advice.fits else Text("does not fit", "dim")
            row.insert(0, fits)
        table.add_row(*row)
    console.print(table)


def render_fitted(fitted: Fitted, console: Console) -> None:
    """What was found, and the other devices that would do."""
    console.print(Text(fitted.sentence, style="bold" if fitted.value else "bold red"))
    if not fitted.candidates:
        return
    table = _plain()
    table.add_column("GPUs")
    for name in ("memory", "KV tokens", "concurrency", "longest"):
        table.add_column(name, justify="right", no_wrap=True)
    for candidate in fitted.candidates[:_SHOWN]:
        kv, longest = candidate.plan.kv_cache, candidate.plan.verdict.max_model_len_that_fits
        table.add_row(
            f"{candidate.count} × {candidate.device.name}",
            format_bytes(candidate.total_bytes),
            f"{kv.tokens or 0:,}",
            f"{kv.max_concurrency or 0:.2f}",
            f"{longest or 0:,}",
        )
    console.print(table)
    more = len(fitted.candidates) - _SHOWN
    if more > 0:
        console.print(Text(f"and {more} larger ones (--json lists all)", style="dim"))
    console.print()


def render_catalogue(devices: Sequence[Device], console: Console) -> None:
    """Names and totals."""
    table = _plain()
    table.add_column("--gpu")
    table.add_column("GiB", justify="right")
    table.add_column("total", style="dim")
    for one in devices:
        words = "as logged" if one.logged else "derived from its kin"
        table.add_row(one.name, f"{one.total_bytes / GiB:.2f}", words)
    console.print(table)


def render_difference(difference: Difference, console: Console) -> None:
    """Old, new and difference of every figure."""
    if difference.facts:
        console.print(_changes("options and facts", difference.facts))
    for group in difference.ranks:
        first, last = group.ranks[0], group.ranks[-1]
        name = f"rank {first}" if first == last else f"ranks {first}-{last} (each)"
        shown = [one for one in group.changes if one.old is not None or one.new is not None]
        console.print(_changes(name, shown))
    console.print(_changes("KV cache", difference.kv_cache))
    if difference.host:
        console.print(_changes("host", difference.host))
    console.print(_changes("verdict", difference.verdict))


def _changes(title: str, changes: Sequence[Change]) -> Table:
    table = _plain()
    table.add_column(title)
    for name in ("old", "new", "difference"):
        table.add_column(name, justify="right", overflow="fold")
    sizes = title.startswith(("rank", "host"))
    for change in changes:
        as_bytes = sizes or change.name.endswith("_bytes")
        table.add_row(
            change.name,
            _figure(change.old, as_bytes),
            _figure(change.new, as_bytes),
            Text(_signed(change.difference, as_bytes), style="" if change.difference else "dim"),
        )
    table.add_row()
    return table


def _figure(value: Any, as_bytes: bool) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if as_bytes:
        return format_bytes(int(value))
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _signed(value: int | float | None, as_bytes: bool) -> str:
    if value is None:
        return ""
    return ("+" if value > 0 else "") + _figure(value, as_bytes)
