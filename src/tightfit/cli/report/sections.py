"""The sections of the page for one plan: facts, options, memory, KV cache, map, advice, notes."""

from tightfit.cli.report import figures
from tightfit.cli.report.components import components
from tightfit.cli.report.figures import Document
from tightfit.cli.report.markup import Markup, element
from tightfit.cli.report.parts import chart, meter, section, sentence, shown, small, spoken
from tightfit.units import format_bytes

_OPEN_TABLES = 2


def headline(document: Document) -> Markup:
    """The verdict, its reason, and the engine's own words."""
    word, class_ = figures.verdict_word(document)
    mark = {"good": "✓ ", "bad": "✕ ", "muted": ""}[class_]
    verdict, engine = document["verdict"], document["engine"]
    said = None
    if verdict["engine_message"]:
        said = element(
            "figure",
            element("figcaption", f"{engine['name']} would say"),
            element("blockquote", verdict["engine_message"]),
            class_="said",
        )
    return element(
        "header",
        element("p", element("span", mark + word, class_=f"verdict {class_}")),
        element("h1", document["model"]["name"]),
        element("p", sentence(verdict["reason"]), class_="reason"),
        said,
        class_="headline",
    )


def facts(document: Document) -> Markup:
    """What was planned, as a list of terms."""
    model, engine, device = document["model"], document["engine"], document["device"]
    kv, verdict = document["kv_cache"], document["verdict"]
    length = int(figures.option(document, "max_model_len", 0))
    longest = verdict["max_model_len_that_fits"]
    rows: list[tuple[str, str, str]] = [
        (
            "Model",
            f"{figures.params(model['params'])} parameters",
            f"{model['architecture']}, {format_bytes(model['checkpoint_bytes'])}, "
            f"known from {model['weights_origin']}",
        ),
        ("Engine", f"{engine['name']} {engine['version']}", f"entry point {engine['entrypoint']}"),
        (
            "Device",
            "none given" if device is None else str(device["name"]),
            "" if device is None else f"{format_bytes(device['total_bytes'])} each",
        ),
        ("Layout", figures.layout(document), ""),
        (
            "Context",
            f"{length:,} tokens",
            ""
            if not longest
            else "the longest that fits"
            if longest == length
            else f"up to {longest:,} would fit",
        ),
    ]
    if kv["num_blocks"]:
        rows.append(
            (
                "KV cache",
                f"{kv['tokens']:,} tokens",
                f"{kv['max_concurrency']:,.2f} sequences of {figures.tokens(length)} at once",
            )
        )
    entries = [
        element("div", element("dt", term), element("dd", value, small(note)))
        for term, value, note in rows
    ]
    return element("dl", *entries, class_="facts")


def options(document: Document) -> Markup:
    """Every resolved option with its origin, on demand."""
    rows = [
        element(
            "tr",
            element("th", element("code", name), scope="row"),
            element("td", shown(chosen["value"])),
            element("td", str(chosen["origin"]), class_="muted"),
        )
        for name, chosen in document["options"].items()
    ]
    head = element("tr", *(element("th", h, scope="col") for h in ("option", "value", "origin")))
    return element(
        "details",
        element("summary", f"All {len(rows)} options, and where each value comes from"),
        element("table", element("thead", head), element("tbody", *rows), class_="plain"),
        class_="fold",
    )


def memory(document: Document) -> Markup:
    """The bars of the ranks, and their components."""
    groups = figures.rank_groups(document)
    bars = [figures.rank_bar(document, group, figures.ranks_name(group)) for group in groups]
    lists: list[object] = []
    decides = groups.index(figures.tightest(document))
    for number, (group, bar) in enumerate(zip(groups, bars, strict=True)):
        body = components(group[0]["components"], bar, int(group[0]["driver_used_bytes"] or 0))
        title = bar.label + (" (each)" if len(group) > 1 else "")
        if len(groups) <= _OPEN_TABLES or number == decides:
            lists.append([element("h3", title) if len(document["ranks"]) > 1 else None, body])
        else:
            total = format_bytes(bar.inside_bytes)
            summary = element("summary", f"{title}: {total}")
            lists.append([element("details", summary, body, class_="fold")])
    return section(
        "Memory of each rank" if len(document["ranks"]) > 1 else "Memory",
        chart(bars, "Memory by component: " + "; ".join(spoken(bar) for bar in bars)),
        *lists,
    )


def host(document: Document) -> Markup | None:
    """The bar of the host, and its components."""
    bar = figures.host_bar(document)
    if bar is None:
        return None
    return section(
        "Memory of the host",
        chart([bar], "Memory by component: " + spoken(bar)),
        components(document["host"]["components"], bar),
    )


def kv_cache(document: Document) -> Markup:
    """The three bounds of one sequence, and the figures of the pool."""
    kv = document["kv_cache"]
    length = int(figures.option(document, "max_model_len", 0))
    one = kv["one_sequence"]
    decides = str(one.get("decides", "reserved"))
    bounds = (
        ("minimum", "What attention can still see", int(one["minimum_bytes"])),
        ("reserved", "What the engine reserves", int(one["reserved_bytes"])),
        ("all_full", "If every layer kept every token", int(one["all_full_bytes"])),
    )
    largest = max(*(nbytes for *_, nbytes in bounds), 1)
    rows = [
        element(
            "li",
            element(
                "span", words, element("b", "decides", class_="tag") if key == decides else None
            ),
            element("span", format_bytes(nbytes), class_="number"),
            meter(nbytes / largest, "kv" if key == decides else "runtime"),
        )
        for key, words, nbytes in bounds
    ]
    alike = len({nbytes for *_, nbytes in bounds}) == 1
    note = "All three are equal: every layer keeps every token." if alike else None
    pool = [
        ("dtype", str(kv["dtype"])),
        ("tokens of a block", f"{kv['block_size']:,}"),
        ("bytes of a block", f"{kv['bytes_per_block']:,}"),
        ("bytes of a token", f"{kv['bytes_per_token']:,}"),
    ]
    if kv["num_blocks"] is not None:
        pool += [
            ("left for the pool", format_bytes(kv["available_bytes"])),
            ("blocks", f"{kv['num_blocks']:,}"),
            ("tokens", f"{kv['tokens']:,}"),
            ("sequences at once", f"{kv['max_concurrency']:,.2f}"),
        ]
    pairs = [element("div", element("dt", term), element("dd", value)) for term, value in pool]
    return section(
        "KV cache of a rank",
        element("p", f"One sequence of {length:,} tokens:", class_="lead"),
        element("ul", *rows, class_="bounds"),
        element("p", note, class_="muted") if note else None,
        element("dl", *pairs, class_="pairs"),
    )


def advice(document: Document) -> Markup | None:
    """What to change, what it saves, and what it costs."""
    if not document["advice"]:
        return None
    rows = []
    for one in document["advice"]:
        fits = {True: "✓ fits", False: "✕ not alone"}.get(one.get("fits"), "")
        class_ = {True: "good", False: "bad"}.get(one.get("fits"), "")
        rows.append(
            element(
                "tr",
                element("th", element("code", one["change"], class_="copy"), scope="row"),
                element("td", format_bytes(int(one["saves_bytes"])), class_="number"),
                element("td", fits, class_=f"{class_} nowrap"),
                element("td", one["costs"]),
            )
        )
    heads = ("change", "saves", "then", "costs")
    head = element(
        "tr",
        *(element("th", h, scope="col", class_="number" if h == "saves" else None) for h in heads),
    )
    table = element("table", element("thead", head), element("tbody", *rows), class_="plain advice")
    return section("What to do", table)


def notes(document: Document) -> Markup | None:
    """What the plan leaves out, and what it assumed."""
    parts = []
    for title, lines in (
        ("Assumed", document.get("warnings", ())),
        ("Not modelled, so leave room for", document["not_modelled"]),
    ):
        if lines:
            items = element("ul", *(element("li", line) for line in lines))
            parts += [element("h3", title), items]
    return section("How far to trust it", *parts) if parts else None
