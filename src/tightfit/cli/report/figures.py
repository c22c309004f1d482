"""What the report reads from a `plan --json` document: bars, labels, and figures with units."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.units import GiB, KiB, MiB, format_bytes

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One component of a bar."""

    name: str
    planned_bytes: int
    inside: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """The memory of one rank, of several alike, of the host, or of one point of a sweep."""

    label: str
    segments: tuple[Segment, ...]
    budget_bytes: int | None = None
    device_bytes: int | None = None
    missing_bytes: int = 0
    """What one sequence needs beyond the room that is left for it."""
    accepted: bool = False
    """Whether the plan fits, as with a KV cache of a given size it may beyond its budget."""

    @property
    def inside_bytes(self) -> int:
        """What the budget pays for, or all of it if there is no budget."""
        return sum(s.planned_bytes for s in self.segments if s.inside)

    @property
    def end_bytes(self) -> int:
        """Where the drawing of the bar ends."""
        inside = self.inside_bytes + self.missing_bytes
        outside = sum(s.planned_bytes for s in self.segments if not s.inside)
        return max(max(inside, self.budget_bytes or 0) + outside, self.device_bytes or 0)

    @property
    def over_bytes(self) -> int:
        """By how much the bar is beyond its budget; 0 if it is not."""
        if self.budget_bytes is None or self.accepted:
            return 0
        return max(self.inside_bytes + self.missing_bytes - self.budget_bytes, 0)


def rank_groups(document: Document) -> list[list[Mapping[str, Any]]]:
    """Ranks that hold the same bytes, together: they are drawn once."""
    groups: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for rank in document["ranks"]:
        key = tuple(
            (c["name"], c["planned_bytes"], c.get("measured_bytes")) for c in rank["components"]
        )
        groups.setdefault(key, []).append(rank)
    return list(groups.values())


def ranks_name(group: Sequence[Mapping[str, Any]]) -> str:
    """`rank 3`, `ranks 0-7` or `ranks 0, 2, 5`."""
    numbers = [int(rank["rank"]) for rank in group]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"ranks {numbers[0]}\N{EN DASH}{numbers[-1]}"
    return "ranks " + ", ".join(map(str, numbers))


def rank_bar(document: Document, group: Sequence[Mapping[str, Any]], label: str) -> Bar:
    """The bar of ranks that are alike; the KV cache comes last, because it is what remains."""
    rank = group[0]
    components = sorted(rank["components"], key=lambda c: c["name"] == "kv_cache")
    device = document["device"]
    return Bar(
        label=label,
        segments=tuple(
            Segment(
                name=str(c["name"]),
                planned_bytes=int(c["planned_bytes"]),
                inside=bool(c.get("inside_budget", True)),
            )
            for c in components
        ),
        budget_bytes=rank["budget_bytes"],
        device_bytes=None if device is None else int(device["total_bytes"]),
        missing_bytes=_missing_bytes(document, rank),
        accepted=document["verdict"]["fits"] is True,
    )


def _missing_bytes(document: Document, rank: Mapping[str, Any]) -> int:
    """What the KV cache of one sequence lacks on that rank."""
    kv, budget = document["kv_cache"], rank["budget_bytes"]
    if document["verdict"]["fits"] is not False or budget is None:
        return 0
    cache = sum(c["planned_bytes"] for c in rank["components"] if c["name"] == "kv_cache")
    return max(int(kv["one_sequence"]["reserved_bytes"]) - int(cache), 0)


def tightest(document: Document) -> list[Mapping[str, Any]]:
    """The alike ranks with the least room for KV cache, which decide for all."""

    def fixed(group: list[Mapping[str, Any]]) -> int:
        inside = (c for c in group[0]["components"] if c.get("inside_budget", True))
        return sum(int(c["planned_bytes"]) for c in inside if c["name"] != "kv_cache")

    return max(rank_groups(document), key=fixed)


def host_bar(document: Document) -> Bar | None:
    """The bar of the host; None if nothing of it is planned."""
    segments = tuple(
        Segment(name=str(c["name"]), planned_bytes=int(c["planned_bytes"]))
        for c in document["host"]["components"]
    )
    if not any(s.planned_bytes for s in segments):
        return None
    return Bar(label="host", segments=segments)


def option(document: Document, name: str, default: Any = None) -> Any:
    """The value of a resolved option."""
    return document["options"].get(name, {}).get("value", default)


def layout(document: Document) -> str:
    """`TP 4 × PP 2: 8 ranks`."""
    short = (("TP", "tensor"), ("PP", "pipeline"), ("DP", "data"))
    sizes = [(s, option(document, f"{name}_parallel_size", 1)) for s, name in short]
    parts = [f"{s} {size}" for s, size in sizes if size and size > 1]
    ranks = len(document["ranks"])
    if option(document, "enable_expert_parallel"):
        parts.append("EP")
    return " × ".join(parts) + f": {ranks} ranks" if parts else plural(ranks, "rank")


def unit_for(nbytes: int) -> tuple[str, int]:
    """The unit in which all figures of a table are given."""
    return ("GiB", GiB) if nbytes >= 4 * GiB else ("MiB", MiB)


def in_unit(nbytes: int, size: int) -> str:
    """A figure of a column: two decimals in GiB, one in MiB; only a true zero is `0`."""
    digits = 2 if size == GiB else 1
    if nbytes == 0:
        return "0"
    if nbytes / size < 0.5 * 10**-digits:
        return f"<{10**-digits:.{digits}f}"
    return f"{nbytes / size:,.{digits}f}"


def tokens(count: int) -> str:
    """`32K` where that is exact (K = 1,024, as in vLLM's options), else all digits."""
    for size, letter in ((KiB * KiB, "M"), (KiB, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{letter}"
    return f"{count:,}"


def params(count: int) -> str:
    """`8.03B`."""
    return f"{count / 1e9:,.2f}B" if count >= 999.5e6 else f"{count / 1e6:,.0f}M"


def plural(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def verdict_word(document: Document) -> tuple[str, str]:
    """What the verdict says, and its class: good, bad or muted."""
    fits = document["verdict"]["fits"]
    words = {True: ("fits", "good"), False: ("does not fit", "bad")}
    return words.get(fits, ("no device", "muted"))


def subject(document: Document) -> str:
    """Model, engine and devices in one line."""
    engine, device = document["engine"], document["device"]
    where = "" if device is None else f" on {len(document['ranks'])} × {device['name']}"
    return f"{document['model']['name']}, {engine['name']} {engine['version']}{where}"


def context_line(document: Document) -> str:
    """The context length, and what the pool makes of it, in one line."""
    length = int(option(document, "max_model_len", 0))
    kv = document["kv_cache"]
    line = f"context of {length:,} tokens"
    if kv["max_concurrency"]:
        line += f", {kv['max_concurrency']:,.2f} sequences of it at once"
    return line + f" ({format_bytes(int(kv['one_sequence']['reserved_bytes']))} each)"
