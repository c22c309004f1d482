"""What `quantize` prints of errors: kinds of modules, the worst matrices, rankings, recipes."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tightfit.cli.output import one_line
from tightfit.quantize.budget import FittedRecipe
from tightfit.quantize.quality import Figures, Quality
from tightfit.quantize.sensitivity import Damage, Sensitivity
from tightfit.units import format_bytes

_WORST = 10
_METER = 24


def render_quality(quality: Quality, console: Console) -> None:
    """A row for each kind of module, and the ten worst matrices."""
    table = _table("quantized", "relative error", "SQNR dB", "largest error", "clipped", "weights")
    for kind, figures in quality.kinds.items():
        table.add_row(kind, *_figures(figures), f"{figures.parameters:,}")
    table.add_row("all", *_figures(quality.total), f"{quality.total.parameters:,}", style="bold")
    console.print(table)
    if quality.caveat is not None:
        console.print(Text(quality.caveat, style="yellow"))
    worst = quality.worst(_WORST)
    table = _table("worst matrices", "relative error", "SQNR dB")
    table.add_column("worst outputs, with their errors", overflow="fold")
    for one in worst:
        outputs = ", ".join(f"{output} ({error:.3f})" for output, error in one.worst[:2])
        table.add_row(_name(one.module), *_figures(one.figures)[:2], outputs)
    console.print(table)


def render_sensitivity(sensitivity: Sensitivity, console: Console) -> None:
    """Layers and kinds of modules, most damaged first."""
    console.print(Text(one_line(f"Damage by {sensitivity.scheme}: {sensitivity.measure}.")))
    for title, some in (("kind", sensitivity.kinds), ("layer", sensitivity.layers)):
        table = _table(title, "damage", "share", "weights")
        table.add_column("")
        most = max((one.damage for one in some), default=0.0)
        shown = some if len(some) <= 2 * _WORST else some[:_WORST]
        for one in shown:
            table.add_row(*_damage(one), _meter(one.damage, most))
        console.print(table)
        if len(some) > len(shown):
            least = ", ".join(one.name for one in some[-3:])
            console.print(Text(f"{len(some) - len(shown)} more; least: {least}", style="dim"))


def render_budget(recipe: FittedRecipe, console: Console) -> None:
    """What each kind of module got, and what it comes to."""
    console.print(
        Text(
            f"{format_bytes(recipe.total_bytes)} of a budget of "
            f"{format_bytes(recipe.budget_bytes)} (the smallest possible: "
            f"{format_bytes(recipe.smallest_bytes)}), relative error {recipe.relative_error:.4f}"
        )
    )
    labels: dict[str, None] = {}
    kinds: dict[str, dict[str, int]] = {}
    for group, option in recipe.decisions:
        label = option.label or "as it is"
        labels[label] = None
        tail = f"{group.where.kind}: {group.name.rpartition('.')[2]}"
        counts = kinds.setdefault(tail, {})
        counts[label] = counts.get(label, 0) + 1
    table = _table("layers with", *sorted(labels))
    for tail, counts in kinds.items():
        table.add_row(_name(tail), *(str(counts.get(label, "")) for label in sorted(labels)))
    console.print(table)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _figures(figures: Figures) -> Sequence[str]:
    ratio = figures.sqnr_db
    return (
        f"{figures.relative_error:.4f}",
        "exact" if ratio is None else f"{ratio:.1f}",
        f"{figures.largest_error:.3g}",
        f"{figures.clipped_share:.2%}" if figures.clipped else "0",
    )


def _damage(one: Damage) -> Iterable[str | Text]:
    return _name(one.name), f"{one.damage:.3g}", f"{one.share:.1%}", f"{one.parameters:,}"


def _meter(value: float, most: float) -> Text:
    return Text("█" * max(round(_METER * value / most), 1) if most else "", style="orange3")


def _name(text: str) -> Text:
    return Text(one_line(text))
