"""The page of `run --bench --report`: throughput over time, and how latencies are spread."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightfit.cli.report import write_file
from tightfit.cli.report.columns import Column, columns
from tightfit.cli.report.markup import Markup, element, join
from tightfit.cli.report.page import assemble
from tightfit.cli.report.parts import section, small
from tightfit.cli.report.quality import check_suffix

Document = Mapping[str, Any]


def write_bench_report(path: Path, document: Document) -> None:
    """Write a page, `.html`, or a picture of it, `.png`, whole or not at all.

    Args:
        path: of the file; what is there is replaced.
        document: of `run --bench --json`.

    Raises:
        UsageError: another suffix.
        OutputError: the file cannot be written, or a `.png` has no browser to draw it.
    """
    check_suffix(path)
    text = bench_page(document).encode()
    if path.suffix.lower() == ".png":
        from tightfit.cli.report.browser import screenshot

        text = screenshot(text)
    write_file(path, text)


def bench_page(document: Document) -> str:
    """The whole HTML document."""
    found = document["bench"]
    body = join(
        [
            _headline(document),
            _facts(document),
            _timeline(found),
            _spread("Time to first token", found["time_to_first_token"], "kv"),
            _spread("Time between tokens", found["inter_token_latency"], "step"),
            _spread("Time of a step", found["step"], "buffers"),
        ]
    )
    title = f"{document['model']['name']}: {found['output_tokens_per_second']:,.0f} tokens/s"
    return assemble("run --bench", join(title), body, str(document["tightfit"]))


def _headline(document: Document) -> Markup:
    found = document["bench"]
    device = document["device"]["name"] if document["device"] else "this machine"
    ranks = len(document["ranks"])
    where = device if ranks == 1 else f"{ranks} ranks on {device}"
    return element(
        "header",
        element("p", where, class_="muted"),
        element("h1", document["model"]["name"]),
        element(
            "p",
            f"{found['output_tokens_per_second']:,.0f} output tokens per second.",
            class_="reason",
        ),
        class_="headline",
    )


def _facts(document: Document) -> Markup:
    found, load = document["bench"], document["bench"]["load"]
    arrival = "all at once"
    if load["request_rate"]:
        arrival = f"{load['request_rate']:g} per second"
    if load["concurrency"]:
        arrival += f", {load['concurrency']} under way at most"
    lengths = [
        f"{low:,}" if low == high else f"{low:,} to {high:,}"
        for low, high in (load["input_len"], load["output_len"])
    ]
    rows = [
        ("Load", f"{found['requests']:,} requests", arrival),
        ("Lengths", f"{lengths[0]} in", f"{lengths[1]} out"),
        (
            "Total",
            f"{found['total_tokens_per_second']:,.0f} tokens/s",
            f"{found['requests_per_second']:,.2f} requests/s",
        ),
        ("First token", _ms(found["time_to_first_token"], "median"), "median"),
        ("Between tokens", _ms(found["inter_token_latency"], "median"), "median"),
        ("Duration", f"{found['duration_seconds']:,.1f} s", f"{found['step']['count']:,} steps"),
    ]
    return element(
        "dl",
        *(
            element("div", element("dt", term), element("dd", value, small(note)))
            for term, value, note in rows
        ),
        class_="facts",
    )


def _timeline(found: Document) -> Markup:
    slices = found["timeline"]
    some = [
        Column(
            label=f"{_short(one['seconds'])} s",
            value=one["output_tokens_per_second"],
            title=f"from {one['seconds']:.1f} s: {one['output_tokens_per_second']:,.0f} tokens/s",
        )
        for one in slices
    ]
    most = max(one.value for one in some)
    return section(
        "Output tokens per second, over time",
        columns(some, "weights", f"Output tokens per second over time, at most {most:,.0f}"),
    )


def _spread(title: str, spread: Document, fill: str) -> Markup | None:
    if not spread["count"]:
        return None
    width, counts = spread["histogram"]["bin_ms"], spread["histogram"]["counts"]
    some = [
        Column(
            label=f"{_short(at * width)} ms",
            value=count,
            title=f"{_short(at * width)} to {_short((at + 1) * width)} ms: {count:,}",
        )
        for at, count in enumerate(counts)
    ]
    words = ", ".join(
        f"{name} {_ms(spread, key)}"
        for name, key in (("median", "median"), ("90 %", "p90"), ("99 %", "p99"), ("most", "max"))
    )
    return section(
        title,
        element("p", words, class_="lead"),
        columns(some, fill, f"{title}: {words}"),
    )


def _ms(spread: Document, key: str) -> str:
    return f"{spread[f'{key}_ms']:,.1f} ms" if spread["count"] else "-"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
