"""The page of `quantize --report`: errors by layer and by matrix, scales, and what suffers most."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tightfit import __version__
from tightfit.cli.report import write_file
from tightfit.cli.report.columns import Column, columns
from tightfit.cli.report.figures import plural
from tightfit.cli.report.markup import Markup, element, join
from tightfit.cli.report.page import assemble
from tightfit.cli.report.parts import meter, section, sentence, small
from tightfit.errors import UsageError
from tightfit.units import format_bytes

Document = Mapping[str, Any]

SUFFIXES = (".html", ".png")
_WORST = 20
_MOST = 500
"""Matrices of the folded table: a mixture of experts has tens of thousands."""


def check_suffix(path: Path) -> None:
    """Refuse a file that cannot be written, before anything is read.

    Raises:
        UsageError: another suffix than .html and .png.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--report {path}: cannot write {path.suffix or 'a file without suffix'}",
            hint="use .html or .png",
        )


def write_quality_report(
    path: Path,
    quality: Document,
    *,
    sensitivity: Document | None = None,
    budget: Document | None = None,
) -> None:
    """Write a page, `.html`, or a picture of it, `.png`, whole or not at all.

    Args:
        path: of the file; what is there is replaced.
        quality: of `Quality.to_json()`.
        sensitivity: of `Sensitivity.to_json()`.
        budget: of `FittedRecipe.to_json()`.

    Raises:
        UsageError: another suffix.
        OutputError: the file cannot be written, or a `.png` has no browser to draw it.
    """
    check_suffix(path)
    text = quality_page(quality, sensitivity=sensitivity, budget=budget).encode()
    if path.suffix.lower() == ".png":
        from tightfit.cli.report.browser import screenshot

        text = screenshot(text)
    write_file(path, text)


def quality_page(
    quality: Document, *, sensitivity: Document | None = None, budget: Document | None = None
) -> str:
    """The whole HTML document."""
    body = join(
        [
            _headline(quality),
            _facts(quality, budget),
            _kinds(quality),
            _layers(quality),
            _sensitivity(sensitivity),
            _recipe(budget),
            _scales(quality),
            _worst(quality),
        ]
    )
    title = f"{quality['model']}, {quality['scheme']} ({quality['method']})"
    return assemble("quantize", join(title), body, __version__)


def _headline(quality: Document) -> Markup:
    total = quality["total"]
    reason = (
        f"all quantized weights together have a relative error of {total['relative_error']:.4f}"
    )
    if total["sqnr_db"] is not None:
        reason += f", which is a ratio of signal to noise of {total['sqnr_db']:.1f} dB"
    return element(
        "header",
        element("p", quality["scheme"], class_="muted"),
        element("h1", quality["model"]),
        element("p", sentence(reason), class_="reason"),
        element("p", sentence(quality["caveat"]), class_="bad") if quality["caveat"] else None,
        class_="headline",
    )


def _facts(quality: Document, budget: Document | None) -> Markup:
    total, matrices = quality["total"], quality["matrices"]
    rows = [
        ("Scheme", quality["scheme"], f"method {quality['method']}"),
        ("Quantized", f"{total['parameters']:,} weights", f"in {len(matrices):,} matrices"),
        ("Relative error", f"{total['relative_error']:.4f}", "‖W−Q‖ / ‖W‖"),
        ("Largest error", f"{total['largest_error']:.3g}", "of any weight"),
        ("Clipped", f"{total['clipped_share']:.3%}", "of weights are beyond their grid"),
    ]
    if budget is not None:
        note = f"of a budget of {format_bytes(budget['budget_bytes'])}"
        rows.append(("Size", format_bytes(budget["total_bytes"]), note))
    return element(
        "dl",
        *(
            element("div", element("dt", term), element("dd", value, small(note)))
            for term, value, note in rows
        ),
        class_="facts",
    )


def _kinds(quality: Document) -> Markup:
    most = max((one["relative_error"] for one in quality["kinds"]), default=0.0) or 1.0
    rows = [
        [
            one["kind"],
            *_cells(one),
            f"{one['parameters']:,}",
            meter(one["relative_error"] / most, "weights"),
        ]
        for one in quality["kinds"]
    ]
    return section("By kind of module", _table(("modules", *_FIGURES, "weights", ""), rows))


def _layers(quality: Document) -> Markup | None:
    layers = quality["layers"]
    if not layers:
        return None
    some = [
        Column(
            label=str(one["layer"]),
            value=one["relative_error"],
            title=f"layer {one['layer']}: {one['relative_error']:.4f}",
        )
        for one in layers
    ]
    rows = [[f"layer {one['layer']}", *_cells(one), f"{one['parameters']:,}"] for one in layers]
    return section(
        "Relative error by layer",
        columns(some, "weights", _spoken("Relative error by layer", some)),
        _fold(
            plural(len(layers), "layer") + " in figures",
            _table(("layer", *_FIGURES, "weights"), rows),
        ),
    )


def _sensitivity(document: Document | None) -> Markup | None:
    if document is None:
        return None
    layers = [one for one in document["layers"] if one["layer"] is not None]
    some = [
        Column(
            label=str(one["layer"]),
            value=one["damage"],
            title=f"layer {one['layer']}: {one['damage']:.3g}",
        )
        for one in sorted(layers, key=lambda one: int(one["layer"]))
    ]

    def ranking(name: str, ranked: Sequence[Document]) -> Markup:
        most = max((one["damage"] for one in ranked), default=0.0) or 1.0
        rows = [
            [
                one["name"],
                f"{one['damage']:.3g}",
                f"{one['share']:.1%}",
                meter(one["damage"] / most, "step"),
            ]
            for one in ranked
        ]
        return _table((name, "damage", "share", ""), rows)

    return section(
        "What suffers most",
        element("p", sentence("Damage is " + document["measure"]), class_="lead"),
        ranking("modules", document["kinds"]),
        element("h3", "Damage by layer"),
        columns(some, "step", _spoken("Damage by layer", some)),
        _fold("All layers, most damaged first", ranking("layer", document["layers"])),
    )


def _recipe(document: Document | None) -> Markup | None:
    if document is None:
        return None
    groups = document["groups"]
    labels = sorted({_scheme(one) for one in groups})
    kinds: dict[str, dict[str, int]] = {}
    for one in groups:
        counts = kinds.setdefault(f"{one['kind']}: {one['name'].rpartition('.')[2]}", {})
        counts[_scheme(one)] = counts.get(_scheme(one), 0) + 1
    counted = [[name, *(counts.get(one, "") for one in labels)] for name, counts in kinds.items()]
    rows = [
        [
            one["name"],
            _scheme(one),
            format_bytes(one["total_bytes"]),
            f"{one['relative_error']:.4f}",
        ]
        for one in groups
    ]
    words = (
        f"{format_bytes(document['total_bytes'])} of a budget of "
        f"{format_bytes(document['budget_bytes'])}; the smallest possible size is "
        f"{format_bytes(document['smallest_bytes'])}."
    )
    return section(
        "The recipe",
        element("p", words, class_="lead"),
        _table(("layers with", *labels), counted),
        _fold("What each group got", _table(("group", "scheme", "size", "relative error"), rows)),
    )


def _scheme(group: Document) -> str:
    return str(group["scheme"] or "as it is")


def _scales(quality: Document) -> Markup | None:
    bins = {int(exponent): count for exponent, count in quality["total"]["scales_log2"].items()}
    if not bins:
        return None
    some = [
        Column(
            label=f"2^{exponent}",
            value=bins.get(exponent, 0),
            title=f"from 2^{exponent} to 2^{exponent + 1}: {bins.get(exponent, 0):,}",
        )
        for exponent in range(min(bins), max(bins) + 1)
    ]
    return section(
        "Sizes of the scales",
        columns(some, "kv", _spoken("Scales by size", some)),
    )


def _worst(quality: Document) -> Markup:
    ranked = sorted(quality["matrices"], key=lambda one: -one["relative_error"])

    def table(some: Sequence[Document]) -> Markup:
        rows = [
            [
                element("code", one["module"]),
                one["scheme"],
                *_cells(one)[:2],
                ", ".join(f"{output} ({error:.3f})" for output, error in one["worst_outputs"][:2]),
            ]
            for one in some
        ]
        return _table(("matrix", "scheme", *_FIGURES[:2], "worst outputs"), rows)

    rest = ranked[_WORST:_MOST]
    more = f"The next {len(rest):,}" + ("" if len(ranked) <= _MOST else f" of {len(ranked):,}")
    return section(
        "Worst matrices", table(ranked[:_WORST]), _fold(more, table(rest)) if rest else None
    )


_FIGURES = ("relative error", "SQNR dB", "largest error", "clipped")


def _cells(one: Document) -> list[str]:
    ratio = one["sqnr_db"]
    return [
        f"{one['relative_error']:.4f}",
        "exact" if ratio is None else f"{ratio:.1f}",
        f"{one['largest_error']:.3g}",
        f"{one['clipped_share']:.3%}" if one["clipped_share"] else "0",
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """The first column names a row; others are numbers unless they are `worst outputs` or so."""
    numbers = [at > 0 and head not in _WORDS for at, head in enumerate(heads)]
    head = element(
        "tr",
        *(
            element("th", name, scope="col", class_="number" if number else None)
            for name, number in zip(heads, numbers, strict=True)
        ),
    )
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(
                element("td", cell, class_=_class(name, number), data_head=name)
                for cell, name, number in zip(row[1:], heads[1:], numbers[1:], strict=True)
            ),
        )
        for row in rows
    ]
    return element(
        "table", element("thead", head), element("tbody", *body), class_="plain sweep figures"
    )


_WORDS = ("", "scheme", "worst outputs")


def _class(head: str, number: bool) -> str | None:
    """A column without a head has meters, which need some width."""
    return "number" if number else None if head else "measured"


def _fold(summary: str, content: Markup) -> Markup:
    return element("details", element("summary", summary), content, class_="fold")


def _spoken(title: str, some: Sequence[Column]) -> str:
    high = max(some, key=lambda one: one.value)
    low = min(some, key=lambda one: one.value)
    return f"{title}: from {low.label} ({low.value:.3g}) to {high.label} ({high.value:.3g})"
