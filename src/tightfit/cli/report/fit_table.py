"""The map of what fits: context length by concurrent sequences, as a table of shares of the pool.

A table and not a picture, because it then prints, scales, and can be read aloud. The cells come
from `tightfit.planner.fit_map`; nothing is interpolated.
"""

from collections.abc import Mapping
from typing import Any

from tightfit.cli.report import figures
from tightfit.cli.report.figures import Document
from tightfit.cli.report.markup import Markup, element
from tightfit.cli.report.parts import section

Grid = Mapping[str, Any]


def fit_section(document: Document, grid: Grid | None) -> Markup:
    """The map of one plan, or the reason why there is none."""
    if grid is None:
        why = "It needs the layout of the KV cache, which this document does not have."
        if document["kv_cache"]["num_blocks"] is None:
            why = "It needs a device: name one with --gpu or --gpu-memory."
        return section("What fits", element("p", why, class_="muted"))
    asked = int(figures.option(document, "max_model_len", 0))
    note = (
        "Share of the KV cache that so many sequences take at once, each as long as the column "
        "says, with all else as planned. Hatched cells do not fit: sequences wait or are preempted."
    )
    return section("What fits", element("p", note, class_="lead"), fit_table(grid, asked))


def fit_table(grid: Grid, asked: int) -> Markup:
    """Rows of concurrent sequences, columns of lengths; the last row says how many fit."""
    lengths = [int(n) for n in grid["lengths"]]
    blocks = [int(n) for n in grid["blocks_per_sequence"]]
    most = [int(n) for n in grid["sequences"]]
    pool, limit = int(grid["pool_blocks"]), int(grid["max_num_seqs"])

    def marked(length: int) -> str | None:
        return "asked" if length == asked else None

    heads = [
        element("th", figures.tokens(n), scope="col", class_=marked(n), title=f"{n:,} tokens")
        for n in lengths
    ]
    rows = []
    for sequences in row_counts(limit, max(most, default=0)):
        cells = []
        for length, each in zip(lengths, blocks, strict=True):
            share = sequences * each / pool if pool else 2.0
            cells.append(_cell(share, marked(length)))
        rows.append(element("tr", element("th", f"{sequences:,}", scope="row"), *cells))
    foot = [
        element("td", f"{n:,}", class_=marked(length))
        for length, n in zip(lengths, most, strict=True)
    ]
    corner = element(
        "th", element("span", "sequences ↓"), element("span", "context →"), scope="col"
    )
    return element(
        "table",
        element("thead", element("tr", corner, *heads)),
        element("tbody", *rows),
        element("tfoot", element("tr", element("th", "at most", scope="row"), *foot)),
        class_="fit",
    )


def _cell(share: float, marked: str | None) -> Markup:
    step = min(int(share * 4) + 1, 4) if share <= 1 else 0
    class_ = f"s{step}" + (f" {marked}" if marked else "")
    if share > 1:
        return element("td", "–", class_=class_, title="does not fit")
    text = "<1%" if share < 0.01 else f"{int(share * 100)}%"
    return element("td", text, class_=class_)


def row_counts(limit: int, most: int) -> list[int]:
    """Powers of two up to the first that never fits, and `max_num_seqs`."""
    powers = [1 << n for n in range(limit.bit_length()) if 1 << n < limit]
    counts = [n for n in powers if n <= max(2 * most, 2)]
    if limit <= max(2 * most, 1):
        counts.append(limit)
    return counts or [1]
