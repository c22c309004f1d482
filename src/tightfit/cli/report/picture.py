"""The verdict and the bars as a standalone SVG, for a README or a ticket; it follows the theme."""

from collections.abc import Sequence

from tightfit.cli.report import figures, sweep
from tightfit.cli.report.drawing import Drawing, clipped, label, text_width
from tightfit.cli.report.figures import Bar, Document
from tightfit.cli.report.markup import Markup, element, join
from tightfit.cli.report.palette import fill, svg_rules
from tightfit.units import format_bytes

_WIDTH = 880
_MARGIN = 24
_COLUMN = 208

_STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;"
    "font-variant-numeric:tabular-nums}.bold{font-weight:600}.big{font-size:20px;font-weight:600}"
    ".middle{font-size:15px;font-weight:600}.tick{font-size:11px}.seam{stroke-width:1.5}.room{stroke-width:1}.grid{stroke-width:1}"
    ".rule{stroke-width:1.5}.device{stroke-dasharray:2 3}.hatch{fill:url(#hatch)}"
    ".overline{opacity:.9}.missing{fill:none;stroke-width:1.5;stroke-dasharray:4 3}"
)


def picture(documents: Sequence[Document]) -> str:
    """The SVG of one plan, or of the points of a sweep."""
    inner = _WIDTH - 2 * _MARGIN
    if len(documents) == 1:
        document = documents[0]
        word, class_ = figures.verdict_word(document)
        title = figures.subject(document)
        about = figures.context_line(document)
        groups = figures.rank_groups(document)
        bars = [figures.rank_bar(document, group, figures.ranks_name(group)) for group in groups]
        host = figures.host_bar(document)
    else:
        _, found = sweep.points(documents, [None] * len(documents))
        word, class_ = sweep.verdict(found)
        title = ", ".join(sweep.subject(found))
        about = "the tightest rank of each point"
        bars, host = [sweep.bar(point) for point in found], None
    mark = {"good": "✓ ", "bad": "✕ ", "muted": ""}[class_]
    drawing = Drawing(bars, inner)
    y = 44.0
    head = label(mark + word, _MARGIN, y, class_=f"big {class_}")
    shift = text_width(mark + word, 21) + 12
    room = _WIDTH - 2 * _MARGIN - shift
    heading = label(clipped(title, room, 15), _MARGIN + shift, y, class_="ink middle")
    lines = [head, heading, label(about, _MARGIN, y + 22, class_="muted")]
    y += 40
    parts = [*lines, _at(drawing, y)]
    y += drawing.height + 14
    if host is not None:
        below = Drawing([host], inner)
        parts.append(_at(below, y))
        y += below.height + 14
    rows, height = _legend(bars, y, figure=len(bars) == 1)
    height += _MARGIN / 2
    style = _STYLE + svg_rules(0) + "@media(prefers-color-scheme:dark){" + svg_rules(1) + "}"
    hatch = Markup(
        '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="2.5" height="6" class="paper" opacity=".55"/>'
        "</pattern></defs>"
    )
    return (
        element(
            "svg",
            element("title", f"{title}: {word}"),
            element("style", Markup(style)),
            hatch,
            element("rect", class_="paper", width=_WIDTH, height=f"{height:g}", rx=8),
            *parts,
            *rows,
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {_WIDTH} {height:g}",
            width=_WIDTH,
            height=f"{height:g}",
            role="img",
        )
        + "\n"
    )


def _at(drawing: Drawing, y: float) -> Markup:
    return element("g", join(drawing.parts()), transform=f"translate({_MARGIN} {y:g})")


def _legend(bars: Sequence[Bar], y: float, *, figure: bool) -> tuple[list[Markup], float]:
    """Swatches with names in columns; with sizes if there is only one bar."""
    parts = []
    used = {s.name: s for bar in bars for s in bar.segments if s.planned_bytes}
    # In the order of the bar that has most of them; what only others have comes after it.
    order = [s.name for s in max(bars, key=lambda bar: len(bar.segments)).segments]
    names = [name for name in dict.fromkeys([*order, *used]) if name in used]
    segments = sorted((used[name] for name in names), key=lambda s: not s.inside)
    columns = (_WIDTH - 2 * _MARGIN) // _COLUMN
    for number, segment in enumerate(segments):
        x = _MARGIN + number % columns * _COLUMN
        line = y + number // columns * 20
        for class_ in (f"f-{fill(segment.name)}", None if segment.inside else "hatch"):
            if class_:
                parts.append(element("rect", class_=class_, x=x, y=line, width=11, height=11, rx=2))
        text = f"{segment.name} {format_bytes(segment.planned_bytes)}" if figure else segment.name
        parts.append(label(text, x + 17, line + 10))
    rows = -(-len(segments) // columns)
    y += rows * 20
    notes = []
    if any(not s.inside for s in segments):
        notes.append("hatched: outside the budget")
    if any(bar.missing_bytes for bar in bars):
        notes.append("dashed: missing for one sequence")
    if notes:
        parts.append(label("; ".join(notes), _MARGIN, y + 10, class_="muted"))
        y += 20
    return parts, y
