"""The legend of a bar, which is also the table of its components: bytes, share, origin, formula."""

from collections.abc import Mapping, Sequence
from typing import Any

from tightfit.cli.report import figures
from tightfit.cli.report.figures import Bar
from tightfit.cli.report.markup import Markup, element
from tightfit.cli.report.palette import fill
from tightfit.cli.report.parts import hidden_text
from tightfit.units import format_bytes


def components(
    planned: Sequence[Mapping[str, Any]], bar: Bar, driver_used_bytes: int = 0
) -> Markup:
    """A row per component in the order of the bar, which unfolds to its formula."""
    unit, size = figures.unit_for(max(bar.inside_bytes, bar.budget_bytes or 0))
    whole = bar.budget_bytes or bar.inside_bytes or 1
    by_name = {c["name"]: c for c in planned}
    measured = any(c.get("measured_bytes") is not None for c in planned)
    share = "of budget" if bar.budget_bytes else "share"
    head = ("component", unit, "measured" if measured else share, "origin")
    rows = [
        element("div", *(element("span", h) for h in head), class_="row head", aria_hidden="true")
    ]
    inside = [s for s in bar.segments if s.inside]
    outside = [s for s in bar.segments if not s.inside]

    def row(segment: figures.Segment) -> Markup:
        component = by_name[segment.name]
        third = f"{segment.planned_bytes / whole:.1%}" if segment.inside else "outside"
        if measured:
            found = component.get("measured_bytes")
            third = "" if found is None else figures.in_unit(int(found), size)
        swatch = element(
            "i", class_=f"swatch f-{fill(segment.name)}" + ("" if segment.inside else " out")
        )
        cells = element(
            "summary",
            element("span", swatch, segment.name),
            element("span", figures.in_unit(segment.planned_bytes, size), hidden_text(unit)),
            element("span", third),
            element("span", component["origin"], class_="muted"),
            class_="row",
        )
        formula = element("p", element("b", str(component["origin"])), ": ", component["formula"])
        return element("details", cells, formula, data_part=segment.name)

    rows += [row(segment) for segment in inside]
    rows.append(
        total(
            "Inside the budget" if outside or bar.budget_bytes else "Together",
            bar.inside_bytes,
            size,
            unit,
            f"{bar.inside_bytes / whole:.1%}",
        )
    )
    if bar.budget_bytes is not None:
        left = bar.budget_bytes - bar.inside_bytes
        word = "Headroom" if left >= 0 else "Beyond the budget"
        note = f"of {format_bytes(bar.budget_bytes)}"
        rows.append(total(word, abs(left), size, unit, f"{abs(left) / whole:.1%}", note))
    if bar.missing_bytes:
        rows.append(total("Missing for one sequence", bar.missing_bytes, size, unit, "", bad=True))
    rows += [row(segment) for segment in outside]
    if outside:
        beside = sum(s.planned_bytes for s in outside)
        rows.append(total("Outside the budget", beside, size, unit, ""))
    if driver_used_bytes and bar.device_bytes is not None:
        note = f"of {format_bytes(bar.device_bytes)}"
        rows.append(total("The driver will show", driver_used_bytes, size, unit, "", note))
    return element("div", *rows, class_="components")


def total(
    name: str, nbytes: int, size: int, unit: str, share: str, note: str = "", *, bad: bool = False
) -> Markup:
    """A row of a sum."""
    value = figures.in_unit(nbytes, size)
    swatch = element("i", class_="swatch lack") if bad else None
    cells = ([swatch, name], [value, hidden_text(unit)], share, note)
    return element(
        "div",
        *(element("span", cell) for cell in cells),
        class_="row total bad" if bad else "row total",
    )
