"""The page of a sweep: a row per point, how many sequences fit by length, then every plan."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.cli.report import figures
from tightfit.cli.report.figures import Bar, Document
from tightfit.cli.report.fit_table import Grid
from tightfit.cli.report.markup import Markup, element
from tightfit.cli.report.parts import chart, meter, section, shown, spoken
from tightfit.units import format_bytes

_SHORT = {
    "tensor_parallel_size": "TP",
    "pipeline_parallel_size": "PP",
    "data_parallel_size": "DP",
    "max_model_len": "context",
    "kv_cache_dtype": "KV dtype",
}


_FIRST = (
    "model",
    "engine",
    "device",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "quantization",
    "max_model_len",
)
_LENGTH = "max_model_len"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One plan of a sweep, with what tells it from the others."""

    document: Document
    grid: Grid | None
    values: tuple[str, ...]
    others: tuple[str, ...]
    """The values without the context length, on which the map hardly depends."""

    @property
    def label(self) -> str:
        """Its values in one line."""
        return ", ".join(self.values)


def points(
    documents: Sequence[Document], grids: Sequence[Grid | None]
) -> tuple[tuple[str, ...], list[Point]]:
    """The names of what was swept, and the points in order."""
    facts = [_facts(document) for document in documents]
    names = list(dict.fromkeys([*_FIRST, *(name for one in facts for name in one)]))
    varied = [n for n in names if len({_key(one.get(n)) for one in facts}) > 1]
    asked = [n for n in varied if any(_asked(document, n) for document in documents)]
    swept = asked or varied or ["model"]
    found = [
        Point(
            document=document,
            grid=grid,
            values=tuple(_named(n, one) for n in swept),
            others=tuple(_named(n, one) for n in swept if n != _LENGTH),
        )
        for document, grid, one in zip(documents, grids, facts, strict=True)
    ]
    return tuple(_SHORT.get(name, name) for name in swept), found


def _facts(document: Document) -> dict[str, Any]:
    """What may tell one plan from another."""
    engine, device = document["engine"], document["device"]
    known = {
        "model": document["model"]["name"],
        "engine": f"{engine['name']} {engine['version']}",
        "device": "none" if device is None else device["name"],
    }
    return known | {name: chosen["value"] for name, chosen in document["options"].items()}


def _asked(document: Document, name: str) -> bool:
    chosen: Mapping[str, Any] = document["options"].get(name, {"origin": "flag"})
    return str(chosen["origin"]) == "flag"


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _named(name: str, facts: Mapping[str, Any]) -> str:
    return f"{_SHORT.get(name, name)} {_value(name, facts.get(name))}"


def _value(name: str, value: Any) -> str:
    if name == "max_model_len" and isinstance(value, int):
        return figures.tokens(value)
    return shown(value)


def headline(found: Sequence[Point]) -> Markup:
    """How many points fit, and of which model."""
    word, class_ = verdict(found)
    models, place = subject(found)
    return element(
        "header",
        element("p", element("span", word, class_=f"verdict {class_}")),
        element("h1", models),
        element("p", place, class_="reason"),
        class_="headline",
    )


def verdict(found: Sequence[Point]) -> tuple[str, str]:
    """What is said of all points, and its class."""
    fitting = sum(point.document["verdict"]["fits"] is True for point in found)
    class_ = "good" if fitting == len(found) else "bad" if not fitting else "muted"
    return f"{fitting} of {len(found)} fit", class_


def subject(found: Sequence[Point]) -> tuple[str, str]:
    """The models of all points, and their engines and devices."""
    models = dict.fromkeys(str(point.document["model"]["name"]) for point in found)
    engines = dict.fromkeys(
        f"{p.document['engine']['name']} {p.document['engine']['version']}" for p in found
    )
    devices = dict.fromkeys(
        "no device" if p.document["device"] is None else str(p.document["device"]["name"])
        for p in found
    )
    return ", ".join(models), f"{', '.join(engines)} on {', '.join(devices)}"


def overview(found: Sequence[Point], names: Sequence[str]) -> Markup:
    """The table of the points, and the bar of the tightest rank of each."""
    heads = [*names, "fits", "KV tokens", "longest fit", "KV per rank"]
    numbers = set(heads[-3:])
    head = element(
        "tr",
        *(element("th", h, scope="col", class_="number" if h in numbers else None) for h in heads),
    )
    tokens = max((p.document["kv_cache"]["tokens"] or 0 for p in found), default=0)
    longest = max((p.document["verdict"]["max_model_len_that_fits"] or 0 for p in found), default=0)
    rows = []
    for number, point in enumerate(found):
        kv, verdict = point.document["kv_cache"], point.document["verdict"]
        word, class_ = figures.verdict_word(point.document)
        mark = {"good": "✓ ", "bad": "✕ "}.get(class_, "")
        values = [
            value.removeprefix(f"{name} ") for name, value in zip(names, point.values, strict=True)
        ]
        first = element("a", values[0], href=f"#point-{number}")
        cells = [element("th", first, scope="row", data_head=names[0])]
        cells += [element("td", v, data_head=n) for n, v in zip(names[1:], values[1:], strict=True)]
        cells.append(element("td", mark + word, class_=f"{class_} nowrap", data_head="fits"))
        cells.append(_measure("KV tokens", kv["tokens"], tokens))
        cells.append(_measure("longest fit", verdict["max_model_len_that_fits"], longest))
        available = kv["available_bytes"]
        left = "–" if available is None else format_bytes(available) if available else "0"
        cells.append(element("td", left, class_="number", data_head=heads[-1]))
        rows.append(element("tr", *cells))
    table = element("table", element("thead", head), element("tbody", *rows), class_="plain sweep")
    bars = [bar(point) for point in found]
    text = "Memory of the tightest rank of each point: " + "; ".join(map(spoken, bars))
    return Markup(
        section("Points of the sweep", table) + section("Tightest rank of each", chart(bars, text))
    )


def bar(point: Point) -> Bar:
    """The bar of the rank that decides."""
    return figures.rank_bar(point.document, figures.tightest(point.document), point.label)


def _measure(head: str, value: int | None, largest: int) -> Markup:
    if value is None:
        return element("td", "–", class_="number", data_head=head)
    share = value / largest if largest else 0.0
    return element(
        "td",
        element("span", f"{value:,}"),
        meter(share, "kv"),
        class_="number measured",
        data_head=head,
    )


def capacity(found: Sequence[Point]) -> Markup | None:
    """How many sequences fit, by point and length."""
    grids = [(point, point.grid) for point in found if point.grid is not None]
    if not grids:
        return None
    lengths = sorted({int(n) for _, grid in grids for n in grid["lengths"]})[-9:]
    heads = [element("th", figures.tokens(n), scope="col", title=f"{n:,} tokens") for n in lengths]
    largest = max(max(map(int, grid["sequences"])) for _, grid in grids)
    alike = {point.others: grid["sequences"] for point, grid in grids}
    rows, done = [], set()
    short = all(point.others and alike[point.others] == grid["sequences"] for point, grid in grids)
    for point, grid in grids:
        label = ", ".join(point.others) if short else point.label
        if label in done:
            continue
        done.add(label)
        known = dict(zip(grid["lengths"], grid["sequences"], strict=True))
        cells = [_count(known.get(n), largest) for n in lengths]
        rows.append(element("tr", element("th", label, scope="row"), *cells))
    table = element(
        "table",
        element("thead", element("tr", element("th", "", scope="col"), *heads)),
        element("tbody", *rows),
        class_="fit counts",
    )
    lead = "How many sequences fit at once, each as long as the column says."
    return section("What fits", element("p", lead, class_="lead"), table)


def _count(sequences: int | None, largest: int) -> Markup:
    if sequences is None:
        return element("td", "", class_="none")
    if sequences == 0:
        return element("td", "–", class_="s0", title="does not fit")
    step = 1 + min(int(4 * sequences.bit_length() / (largest.bit_length() + 1)), 3)
    return element("td", f"{sequences:,}", class_=f"s{step}")
