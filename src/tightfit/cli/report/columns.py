"""Columns side by side as SVG: a figure for each layer, or how many of each size there are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tightfit.cli.report.drawing import label, text_width
from tightfit.cli.report.markup import Markup, element
from tightfit.cli.report.parts import WIDTHS

_TALL = 150.0
_ABOVE = 12.0
_BELOW = 22.0
_TICKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One of them; `title` is for a pointer that hovers."""

    label: str
    value: float
    title: str


def columns(some: Sequence[Column], fill: str, description: str) -> Markup:
    """A drawing for every width; style sheets show the right one.

    Args:
        some: from left to right; no value is negative.
        fill: one of `palette.FILLS`.
        description: in words, for those who do not see it.
    """
    drawings = [_drawing(some, fill, width, class_) for class_, width in WIDTHS.items()]
    return element("div", *drawings, class_="charts", role="img", aria_label=description)


def _drawing(some: Sequence[Column], fill: str, width: int, class_: str) -> Markup:
    longest = max((one.value for one in some), default=0.0) or 1.0
    step = _step(longest)
    ticks = [step * i for i in range(math.floor(longest / step * 1.0001) + 1)]
    left = max(text_width(_tick(tick), 11) for tick in ticks) + 10
    pitch = (width - left) / max(len(some), 1)
    bottom = _ABOVE + _TALL
    parts = []
    for tick in ticks:
        y = bottom - tick / longest * _TALL
        line = element(
            "line", class_="grid", x1=f"{left:.1f}", x2=width, y1=f"{y:.1f}", y2=f"{y:.1f}"
        )
        parts += [line, label(_tick(tick), left - 6, y + 4, anchor="end", class_="muted tick")]
    gap = min(pitch * 0.2, 4.0)
    for at, one in enumerate(some):
        x, tall = left + at * pitch, one.value / longest * _TALL
        shape = element(
            "rect",
            class_=f"seg f-{fill}",
            x=f"{x + gap / 2:.2f}",
            y=f"{bottom - tall:.2f}",
            width=f"{max(pitch - gap, 0.5):.2f}",
            height=f"{max(tall, 0.4):.2f}",
        )
        # Titles are for a pointer that hovers, which narrow screens seldom have.
        if class_ == "wide":
            shape = Markup(shape.removesuffix("/>") + ">" + element("title", one.title) + "</rect>")
        parts.append(shape)
    every = _every(some, pitch)
    for at in range(0, len(some), every):
        middle = left + (at + 0.5) * pitch
        name = some[at].label
        parts.append(label(name, middle, bottom + 15, anchor="middle", class_="muted tick"))
    box = f"0 0 {width} {bottom + _BELOW:g}"
    return element("svg", *parts, class_=f"chart {class_}", viewBox=box, aria_hidden="true")


def _step(longest: float) -> float:
    """A round distance of ticks: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(longest / _TICKS))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= longest / _TICKS)


def _tick(value: float) -> str:
    return f"{value:,g}" if value < 1e6 else f"{value / 1e6:,g}M"


def _every(some: Sequence[Column], pitch: float) -> int:
    """Of how many columns one has its label."""
    widest = max((text_width(one.label, 11) for one in some), default=0.0) + 8
    wanted = max(math.ceil(widest / pitch), 1)
    return next(n for n in (1, 2, 5, 10, 20, 50, 100, wanted) if n >= wanted)
