"""Pieces of which several sections are made."""

from collections.abc import Sequence

from tightfit.cli.report.drawing import Drawing
from tightfit.cli.report.figures import Bar
from tightfit.cli.report.markup import Markup, element
from tightfit.units import format_bytes

WIDTHS = {"wide": 940, "medium": 640, "narrow": 324}
"""Widths for which a drawing is made, by the class that shows it."""


def chart(bars: Sequence[Bar], description: str) -> Markup:
    """A drawing for every width; style sheets show the right one."""
    drawings = [
        # Titles are for a pointer that hovers, which narrow screens seldom have.
        Drawing(bars, width, titled=class_ == "wide").svg(f"chart {class_}")
        for class_, width in WIDTHS.items()
    ]
    return element("div", *drawings, class_="charts", role="img", aria_label=description)


def spoken(bar: Bar) -> str:
    """A bar in words."""
    parts = ", ".join(f"{s.name} {format_bytes(s.planned_bytes)}" for s in bar.segments)
    end = "" if bar.budget_bytes is None else f", of a budget of {format_bytes(bar.budget_bytes)}"
    return f"{bar.label}: {parts}{end}"


def section(title: str, *children: object) -> Markup:
    """A part of the page with its heading."""
    return element("section", element("h2", title), *children)


def meter(share: float, color: str) -> Markup:
    """A bar in a table, whose figure stands beside it."""
    width = f"width:{max(min(share, 1.0), 0.0):.2%}"
    shown = element("i", class_=f"f-{color}", style=width) if share > 0 else None
    return element("span", shown, class_="meter")


def small(text: str) -> Markup | None:
    """A note under a value."""
    return element("small", text) if text else None


def hidden_text(text: str) -> Markup:
    """What only those need who do not see the head of the column."""
    return element("span", f" {text}", class_="unseen")


def shown(value: object) -> str:
    """An option's value in a table."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value)


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
