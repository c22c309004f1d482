"""The figures of bench_load.py as an SVG: what one rank reads, and how long loading takes."""

from collections.abc import Mapping
from typing import Any

from tightfit.cli.report.drawing import label, text_width, tick_step
from tightfit.cli.report.markup import Markup, element
from tightfit.cli.report.palette import FILLS, GRID, INK, MUTED, PAPER

NAMES: Mapping[str, tuple[str, str]] = {
    "sharded": ("rank files", "kv"),
    "plain": ("plain, tightfit", "weights"),
    "lazy": ("plain, safe_open", "step"),
    "whole": ("plain, whole files", "graphs"),
}
"""What a line is called, and its colour."""
_PANELS = (
    ("disk_share_of_checkpoint", "one", "Read from disk by one rank", "× checkpoint"),
    ("times_sharded_tp1_median", "one", "Time of one rank alone", "× rank files at TP 1"),
    ("times_sharded_tp1_median", "all", "Time of all ranks at once", "× rank files at TP 1"),
)
_WIDTH, _HEIGHT, _MARGIN, _GAP = 880, 300, 24, 34
_TOP, _BOTTOM, _LEFT = 92, 258, 30


def chart(result: Mapping[str, Any]) -> str:
    """Lines over the tensor parallel size, from an empty page cache."""
    rows = [row for row in result["rows"] if row["cache"] == "cold" and row["way"] in NAMES]
    sizes = sorted({row["tensor_parallel_size"] for row in rows})
    parts: list[Markup] = []
    width = (_WIDTH - 2 * _MARGIN - 2 * _GAP) / 3
    for number, (figure, ranks, title, unit) in enumerate(_PANELS):
        left = _MARGIN + number * (width + _GAP)
        found = {
            (row["way"], row["tensor_parallel_size"]): row[figure]
            for row in rows
            if row["ranks"] == ranks or row["tensor_parallel_size"] == 1
        }
        lines = {way: [found[way, size] for size in sizes] for way in NAMES}
        parts += _panel(lines, sizes, left, width, title, unit)
    style = (
        "text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,"
        "sans-serif}.bold{font-weight:600}.tick{font-size:11px}polyline{fill:none;stroke-width:2.5}"
        + _colors(0)
        + "@media(prefers-color-scheme:dark){"
        + _colors(1)
        + "}"
    )
    svg = element(
        "svg",
        element("title", "Loading at tensor parallel size 1, 2, 4 and 8 with an empty page cache"),
        element("style", Markup(style)),
        element("rect", class_="paper", width=_WIDTH, height=_HEIGHT, rx=8),
        *_legend(),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        width=_WIDTH,
        height=_HEIGHT,
        role="img",
    )
    return svg + "\n"


def _panel(
    lines: Mapping[str, list[float]],
    sizes: list[int],
    left: float,
    width: float,
    title: str,
    unit: str,
) -> list[Markup]:
    top = max(max(values) for values in lines.values())
    step = tick_step(top, 5)
    scale = (_BOTTOM - _TOP) / top

    def at(number: int, value: float) -> tuple[float, float]:
        # Sizes double, so they are as far from each other.
        return left + _LEFT + number * (width - _LEFT - 8) / (
            len(sizes) - 1
        ), _BOTTOM - value * scale

    parts = [
        label(title, left, _TOP - 32, class_="ink bold"),
        label(unit, left, _TOP - 16, class_="muted tick"),
    ]
    for tick in range(int(top / step) + 1):
        y = at(0, tick * step)[1]
        ends = {
            "x1": f"{left + _LEFT:g}",
            "x2": f"{left + width:g}",
            "y1": f"{y:g}",
            "y2": f"{y:g}",
        }
        text = f"{tick * step:g}"
        x = left + _LEFT - 6 - text_width(text, 11)
        parts += [
            element("line", class_="grid", **ends),
            label(text, x, y + 4, class_="muted tick"),
        ]
    for number, size in enumerate(sizes):
        text = f"TP {size}" if number == 0 else str(size)
        x = at(number, 0)[0] - text_width(text, 11) / 2
        parts.append(label(text, x, _BOTTOM + 18, class_="muted tick"))
    for way, values in reversed(lines.items()):
        points = [at(number, value) for number, value in enumerate(values)]
        color = NAMES[way][1]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(element("polyline", class_=f"s-{color}", points=path))
        parts += [
            element("circle", class_=f"f-{color}", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.5)
            for x, y in points
        ]
    return parts


def _legend() -> list[Markup]:
    parts, x = [], float(_MARGIN)
    for name, color in NAMES.values():
        parts.append(element("rect", class_=f"f-{color}", x=f"{x:g}", y=20, width=18, height=4))
        parts.append(label(name, x + 25, 27, class_="ink"))
        x += 45 + text_width(name)
    return parts


def _colors(theme: int) -> str:
    rules = [
        f".ink{{fill:{INK[theme]}}}.muted{{fill:{MUTED[theme]}}}.paper{{fill:{PAPER[theme]}}}",
        f".grid{{stroke:{GRID[theme]}}}",
    ]
    for _, color in NAMES.values():
        shade = FILLS[color][theme]
        rules.append(f".f-{color}{{fill:{shade}}}.s-{color}{{stroke:{shade}}}")
    return "".join(rules)
