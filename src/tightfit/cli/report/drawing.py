"""Stacked bars of memory as SVG: the same drawing in the page and in the standalone picture.

All text is of a size that is readable at the width for which it is drawn; the page holds a drawing
per width and shows one. A segment is labelled where its name fits into it, and the legend has all.
"""

import math
from collections.abc import Sequence

from tightfit.cli.report import figures
from tightfit.cli.report.figures import Bar
from tightfit.cli.report.markup import Markup, element
from tightfit.cli.report.palette import fill
from tightfit.units import format_bytes

TEXT = 12
_CHARACTER = 0.56
"""Of the text's size: a mean width that no common sans-serif font exceeds for our labels."""
_LINE = 17


def text_width(text: str, size: float = TEXT) -> float:
    """About how wide a text is."""
    return len(text) * size * _CHARACTER


class Drawing:
    """Bars of one scale, below each other, at a width in CSS pixels."""

    def __init__(self, bars: Sequence[Bar], width: int, *, titled: bool = True) -> None:
        self.bars = bars
        self.width = width
        self._titled = titled
        self._narrow = width < 560
        labels = max(40.0, *(text_width(bar.label, TEXT * 1.1) for bar in bars)) + 14
        self._left = 0.0 if self._narrow else min(labels, width * 0.28)
        self._right = 0.0 if self._narrow else 118.0
        self._thick = 34 if len(bars) <= 4 else 20
        self._scale = (width - self._left - self._right - 2) / max(*(b.end_bytes for b in bars), 1)
        self.height = 0.0

    def x(self, nbytes: float) -> float:
        """Where that many bytes are."""
        return self._left + 1 + nbytes * self._scale

    def parts(self) -> list[Markup]:
        """The elements, and with them `height`."""
        budgets = {bar.budget_bytes for bar in self.bars} - {None}
        devices = {bar.device_bytes for bar in self.bars} - {None}
        top, heads = 0.0, []
        for kind, values in (("device", devices), ("budget", budgets)):
            if len(values) == 1 and self.bars[0].device_bytes is not None:
                (nbytes,) = values
                assert nbytes is not None
                if not self._narrow:
                    top += _LINE
                heads.append((kind, nbytes, top - 5))
        y, drawn = top + 2, []
        for bar in self.bars:
            rows, y = self._bar(bar, y)
            drawn.append(rows)
        bottom = y - self._gap + 4
        axis = self._axis(top + 2, bottom)
        self.height = bottom + 20
        if self._narrow:
            lines = self._key(heads)
        else:
            lines = [self._head(kind, nbytes, y, top) for kind, nbytes, y in heads]
        return [*axis, *(part for rows in drawn for part in rows), *lines]

    def svg(self, class_: str) -> Markup:
        """The drawing as an element of the page."""
        parts = self.parts()
        box = f"0 0 {self.width} {self.height:g}"
        return element("svg", *parts, class_=class_, viewBox=box, aria_hidden="true")

    @property
    def _gap(self) -> float:
        return 12.0 if len(self.bars) <= 4 else 8.0

    def _bar(self, bar: Bar, y: float) -> tuple[list[Markup], float]:
        parts = []
        over = bar.over_bytes
        figure = format_bytes(bar.inside_bytes)
        state = f"{format_bytes(over)} over" if over else ""
        if not over and bar.budget_bytes is not None:
            state = f"of {format_bytes(bar.budget_bytes)}"
        if self._narrow:
            right = f"{figure}, {state}" if over else f"{figure} {state}".strip()
            parts += [
                label(bar.label, 0, y + 12, bold=True),
                label(right, self.width, y + 12, anchor="end", class_="bad" if over else "ink"),
            ]
            y += _LINE + 1
        middle = y + self._thick / 2 + 4
        if not self._narrow:
            short = clipped(bar.label, self._left - 8)
            parts.append(label(short, self._left - 10, middle, anchor="end", bold=True))
            edge = self.width - self._right + 12
            if self._thick > 24 and state:
                parts.append(label(figure, edge, middle - 7, bold=True))
                parts.append(label(state, edge, middle + 8, class_="bad" if over else "muted"))
            else:
                color = "bad" if over else "ink"
                parts.append(label(figure + (" ✕" if over else ""), edge, middle, class_=color))
        if bar.device_bytes is not None:
            parts.append(self._rect("room", 0, bar.device_bytes, y))
        at = 0
        for inside in (True, False):
            if not inside:
                at = max(at + bar.missing_bytes, bar.budget_bytes or 0)
            for segment in bar.segments:
                if segment.inside == inside and segment.planned_bytes:
                    parts += self._segment(segment, at, y, bar)
                    at += segment.planned_bytes
            if inside and bar.missing_bytes:
                parts.append(self._missing(bar, at, y))
        for kind, limit in (("budget", bar.budget_bytes), ("device", bar.device_bytes)):
            if limit is not None and bar.device_bytes is not None:
                parts.append(self._rule(kind, limit, y - 3, y + self._thick + 3))
        if over and bar.budget_bytes is not None:
            excess = self._rect("bad", bar.budget_bytes, over, y + self._thick + 2)
            parts.append(Markup(excess.replace(f'height="{self._thick}"', 'height="2"')))
        return parts, y + self._thick + self._gap

    def _segment(self, segment: figures.Segment, at: int, y: float, bar: Bar) -> list[Markup]:
        name, size = segment.name, segment.planned_bytes
        where = "" if segment.inside else ", outside the budget"
        title = f"{name}: {format_bytes(size)}{where}"
        wide = size * self._scale
        shape = self._rect(f"seg f-{fill(name)}", at, size, y, title=title, part=name)
        parts = [shape]
        if not segment.inside:
            parts.append(self._rect("hatch", at, size, y, part=name))
        if wide > 3:
            parts.append(self._seam(self.x(at + size), y))
        # A label keeps clear of the lines that cross its segment.
        limits = [n - at for n in (bar.budget_bytes, bar.device_bytes) if n and at < n < at + size]
        room = min([size, *limits])
        for text in (f"{name} {format_bytes(size)}", name):
            if segment.inside and text_width(text) + 10 < room * self._scale:
                middle = self.x(at + room / 2)
                ink = f"i-{fill(name)} in"
                height = y + self._thick / 2 + 4
                parts.append(label(text, middle, height, anchor="middle", class_=ink))
                break
        return parts

    def _missing(self, bar: Bar, at: int, y: float) -> Markup:
        title = f"one sequence needs {format_bytes(bar.missing_bytes)} more KV cache"
        return self._rect("missing badline", at, bar.missing_bytes, y, title=title, part="kv_cache")

    def _rect(
        self, class_: str, at: int, size: int, y: float, *, title: str = "", part: str = ""
    ) -> Markup:
        attributes = {
            "class_": class_,
            "x": f"{self.x(at):.2f}",
            "y": f"{y:g}",
            "width": f"{max(size * self._scale, 0.4):.2f}",
            "height": self._thick,
            "data_part": part if self._titled and part else None,
        }
        rect = element("rect", **attributes)
        if not (title and self._titled):
            return rect
        return Markup(rect.removesuffix("/>") + ">" + element("title", title) + "</rect>")

    def _seam(self, x: float, y: float) -> Markup:
        return element(
            "line", class_="seam", x1=f"{x:.2f}", x2=f"{x:.2f}", y1=f"{y:g}", y2=y + self._thick
        )

    def _rule(self, kind: str, nbytes: int, top: float, bottom: float) -> Markup:
        x = f"{self.x(nbytes):.2f}"
        return element("line", class_=f"rule {kind}", x1=x, x2=x, y1=f"{top:g}", y2=f"{bottom:g}")

    def _key(self, heads: Sequence[tuple[str, int, float]]) -> list[Markup]:
        """What the lines mean, below the drawing, where there is no room above it."""
        parts, x = [], 1.0
        for kind, nbytes, _ in reversed(heads):
            y = self.height + 12
            text = f"{kind} {format_bytes(nbytes)}"
            parts.append(element("line", class_=f"rule {kind}", x1=x, x2=x, y1=y - 10, y2=y + 2))
            parts.append(label(text, x + 7, y))
            x += text_width(text) + 30
        self.height += 18 if heads else 0
        return parts

    def _head(self, kind: str, nbytes: int, y: float, bottom: float) -> Markup:
        x = self.x(nbytes)
        text = f"{kind} {format_bytes(nbytes)}"
        anchor = "end" if x > text_width(text) + 4 else "start"
        line = self._rule(kind, nbytes, y - 10, bottom)
        shift = -5 if anchor == "end" else 5
        return Markup(line + label(text, x + shift, y, anchor=anchor, class_="ink"))

    def _axis(self, top: float, bottom: float) -> list[Markup]:
        longest = max(bar.end_bytes for bar in self.bars)
        unit, size = figures.unit_for(longest)
        step = tick_step(longest / size, (self.width - self._left - self._right) / 70)
        parts, value = [], 0.0
        while value * size <= longest * 1.0001:
            x = f"{self.x(value * size):.2f}"
            text = f"{value:,g}" if value else f"0 {unit}"
            parts.append(
                element("line", class_="grid", x1=x, x2=x, y1=f"{top:g}", y2=f"{bottom:g}")
            )
            near_end = self.width - float(x) < text_width(text) / 2
            anchor = "start" if value == 0 else "end" if near_end else "middle"
            parts.append(label(text, float(x), bottom + 14, anchor=anchor, class_="muted tick"))
            value += step
        return parts


def label(
    text: str,
    x: float,
    y: float,
    *,
    anchor: str | None = None,
    class_: str = "ink",
    bold: bool = False,
) -> Markup:
    """One line of text."""
    return element(
        "text",
        text,
        class_=class_ + (" bold" if bold else ""),
        x=f"{x:.1f}",
        y=f"{y:.1f}",
        text_anchor=anchor,
    )


def clipped(text: str, width: float, size: float = TEXT) -> str:
    """A text that is cut where it would be wider than that."""
    room = max(int(width / (size * _CHARACTER)), 4)
    return text if len(text) <= room else text[: room - 1] + "…"


def tick_step(longest: float, ticks: float) -> float:
    """A round distance of ticks (1, 2 or 5 times a power of ten), for at most so many of them."""
    wanted = longest / max(ticks, 2)
    power = 10.0 ** math.floor(math.log10(max(wanted, 1e-3)))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= wanted)
