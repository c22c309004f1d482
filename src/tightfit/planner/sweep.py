"""A table of plans over every combination of some options' values."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from tightfit.errors import TightfitError, UsageError
from tightfit.planner.devices import named
from tightfit.planner.headroom import spare_bytes
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import SCHEMA, Plan
from tightfit.planner.spelling import option_name, plan_options, read_option

MAX_POINTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One option and the values that it takes, in order."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One combination: its plan, or why there is none."""

    options: Mapping[str, Any]
    plan: Plan | None
    planned: PlanOptions | None
    """All options of the plan."""
    error: TightfitError | None

    def to_json(self) -> dict[str, Any]:
        """The point in schema 1."""
        plan = self.plan
        return {
            "options": dict(self.options),
            "verdict": plan and plan.verdict.to_json(),
            "kv_cache": plan and plan.kv_cache.to_json(),
            "spare_bytes": plan and (plan.device and spare_bytes(plan)),
            "error": self.error and self.error.message,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All points, the last axis running fastest."""

    axes: tuple[Axis, ...]
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """The sweep in schema 1."""
        return {
            "schema": SCHEMA,
            "sweep": {
                "axes": {axis.name: list(axis.values) for axis in self.axes},
                "points": [point.to_json() for point in self.points],
            },
        }


def read_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """Axes from `tp=1,2,4` and the like; values that are lists use spaces: `1 2 4,1 8`.

    Raises:
        UsageError: not of that form, an unknown option, too many points.
    """
    axes = tuple(_axis(text) for text in texts)
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--sweep names {name} twice", hint="give all its values at once")
    count = prod(len(axis.values) for axis in axes)
    if count > MAX_POINTS:
        raise UsageError(
            f"--sweep would make {count:,} plans", hint=f"at most {MAX_POINTS:,}: drop some values"
        )
    return axes


def _axis(text: str) -> Axis:
    key, found, values = text.partition("=")
    words = _words(values)
    if not found or not words:
        raise UsageError(
            f"--sweep {text!r} is not of the form KEY=V1,V2", hint="such as --sweep tp=1,2,4"
        )
    name = option_name(key)
    if name == "gpu":
        return Axis(name=name, values=tuple(named(word).name for word in words))
    return Axis(name=name, values=tuple(read_option(name, word) for word in words))


def _words(text: str) -> list[str]:
    """Values between commas; a JSON object is one value."""
    words: list[str] = []
    decoder = json.JSONDecoder()
    while text:
        if text.startswith("{"):
            try:
                _, end = decoder.raw_decode(text)
            except ValueError:
                end = len(text)
            word, text = text[:end], text[end:].lstrip().removeprefix(",")
        else:
            word, _, text = text.partition(",")
        words.append(word.strip())
    return [word for word in words if word]


def sweep(
    axes: tuple[Axis, ...],
    asked: Mapping[str, object],
    replan: Callable[[PlanOptions], Plan],
) -> Sweep:
    """Plan every combination; one that cannot be says why.

    Args:
        axes: what varies.
        asked: the other options, as given; those that vary are overridden.
        replan: makes a plan of the model from options.
    """
    names = [axis.name for axis in axes]
    fixed = dict(asked)
    if "gpu" in names or "gpu_memory" in names:
        fixed |= {"gpu": None, "gpu_memory": None}
    points: list[Point] = []
    for values in product(*(axis.values for axis in axes)):
        options = dict(zip(names, values, strict=True))
        try:
            planned = plan_options(fixed | options)
            plan = replan(planned)
        except TightfitError as error:
            points.append(Point(options=options, plan=None, planned=None, error=error))
        else:
            points.append(Point(options=options, plan=plan, planned=planned, error=None))
    return Sweep(axes=axes, points=tuple(points))
