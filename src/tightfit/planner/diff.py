"""What changed between two plans, from their JSON documents."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.errors import UsageError
from tightfit.planner.plan import COMPONENTS, HOST_COMPONENTS, SCHEMA

_KV = (
    "bytes_per_token",
    "bytes_per_block",
    "available_bytes",
    "num_blocks",
    "tokens",
    "max_concurrency",
)
_ONE_SEQUENCE = ("minimum_bytes", "reserved_bytes", "all_full_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure of both plans; None where a plan has no such figure."""

    name: str
    old: Any
    new: Any

    @property
    def difference(self) -> int | float | None:
        """New minus old, of numbers; a component that a plan lacks counts as 0."""
        if isinstance(self.old, bool) or isinstance(self.new, bool):
            return None
        numbers = [one for one in (self.old, self.new) if isinstance(one, int | float)]
        if not numbers or not all(
            one is None or isinstance(one, int | float) for one in (self.old, self.new)
        ):
            return None
        return (self.new or 0) - (self.old or 0)

    def to_json(self) -> dict[str, Any]:
        """The figure in schema 1."""
        return {"name": self.name, "old": self.old, "new": self.new, "difference": self.difference}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankChanges:
    """The changes that these ranks have in common."""

    ranks: tuple[int, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """All figures of two plans, side by side."""

    facts: tuple[Change, ...]
    """Model, engine, device and options, where they differ."""
    ranks: tuple[RankChanges, ...]
    kv_cache: tuple[Change, ...]
    host: tuple[Change, ...]
    verdict: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        """The difference in schema 1."""
        return {
            "schema": SCHEMA,
            "diff": {
                "facts": [one.to_json() for one in self.facts],
                "ranks": [
                    {"ranks": list(one.ranks), "components": [c.to_json() for c in one.changes]}
                    for one in self.ranks
                ],
                "kv_cache": [one.to_json() for one in self.kv_cache],
                "host": [one.to_json() for one in self.host],
                "verdict": [one.to_json() for one in self.verdict],
            },
        }


def read_plan(path: Path) -> dict[str, Any]:
    """A plan's JSON document.

    Raises:
        UsageError: the file cannot be read, or holds no plan of this schema.
    """
    hint = "make it with `tightfit plan MODEL --json`"
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint=hint) from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not JSON", hint=hint) from None
    if not isinstance(document, dict) or "ranks" not in document or "kv_cache" not in document:
        raise UsageError(f"{path} is not a plan", hint=hint)
    if document.get("schema") != SCHEMA:
        raise UsageError(
            f"{path} has the schema {document.get('schema')!r}, not {SCHEMA}", hint=hint
        )
    return document


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference:
    """Compare two documents of schema 1.

    Raises:
        UsageError: one of them lacks what every plan has.
    """
    try:
        return Difference(
            facts=tuple(_facts(old, new)),
            ranks=_ranks(old["ranks"], new["ranks"]),
            kv_cache=tuple(_kv(old["kv_cache"], new["kv_cache"])),
            host=tuple(_host(old.get("host") or {}, new.get("host") or {})),
            verdict=tuple(
                Change(name=name, old=old["verdict"].get(name), new=new["verdict"].get(name))
                for name in ("fits", "max_model_len_that_fits")
            ),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"a plan lacks what plans have: {error!r}",
            hint="make both with `tightfit plan MODEL --json`",
        ) from None


def _facts(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Change]:
    def flat(plan: Mapping[str, Any]) -> dict[str, Any]:
        model, engine, device = plan["model"], plan["engine"], plan.get("device") or {}
        return {
            "model": model["name"],
            "params": model["params"],
            "engine": f"{engine['name']} {engine['version']}",
            "device": device.get("name"),
            "ranks": len(plan["ranks"]),
        } | {name: option["value"] for name, option in plan["options"].items()}

    before, after = flat(old), flat(new)
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            yield Change(name=name, old=before.get(name), new=after.get(name))


def _components(document: Mapping[str, Any]) -> dict[str, int]:
    return {one["name"]: int(one["planned_bytes"]) for one in document.get("components", ())}


def _in_order(names: Iterable[str], order: tuple[str, ...]) -> list[str]:
    known = {name: i for i, name in enumerate(order)}
    return sorted(dict.fromkeys(names), key=lambda name: known.get(name, len(order)))


def _ranks(old: list[Any], new: list[Any]) -> tuple[RankChanges, ...]:
    """Rank by rank, as far as both have them; those with the same figures together."""
    groups: dict[tuple[Change, ...], list[int]] = {}
    for before, after in zip(old, new, strict=False):
        first, second = _components(before), _components(after)
        changes = [
            Change(name=name, old=first.get(name), new=second.get(name))
            for name in _in_order([*first, *second], COMPONENTS)
        ]
        for name in ("total_bytes", "budget_bytes", "headroom_bytes", "driver_used_bytes"):
            changes.append(Change(name=name, old=before.get(name), new=after.get(name)))
        groups.setdefault(tuple(changes), []).append(int(before["rank"]))
    return tuple(
        RankChanges(ranks=tuple(ranks), changes=changes) for changes, ranks in groups.items()
    )


def _kv(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Change]:
    for name in _KV:
        yield Change(name=name, old=old.get(name), new=new.get(name))
    before, after = old["one_sequence"], new["one_sequence"]
    for name in _ONE_SEQUENCE:
        yield Change(name=f"one_sequence.{name}", old=before.get(name), new=after.get(name))


def _host(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Change]:
    before, after = _components(old), _components(new)
    for name in _in_order([*before, *after], HOST_COMPONENTS):
        yield Change(name=name, old=before.get(name), new=after.get(name))
