"""Planned beside measured: fill a plan with what a run measured, and judge each difference.

Imports no torch, so that the command line can show a stored result as well.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tightfit.planner.engines.builtin_memory import ESTIMATED, OTHER_VERSION
from tightfit.planner.plan import Plan
from tightfit.units import MiB

EXACT_TOLERANCE = 0.01
"""Weights and KV cache are known to the byte; what a kernel counts is whole pages."""
EXACT_SLACK_BYTES = 4 * MiB
"""Every tensor that lies in a file has pages that are not wholly its own; quantized models have
many tensors."""
OTHER_SLACK_BYTES = 24 * MiB
"""Small components drown in the noise of a process: allocators keep pages, libraries grow."""
CPU_TOLERANCE = 0.1
GPU_TOLERANCE = 0.03
GPU_SLACK_BYTES = 100 * MiB
TOTAL_TOLERANCE = 0.01
"""On a GPU, of the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison; the component `total` is the whole resident memory of a rank."""

    rank: int
    component: str
    planned_bytes: int
    measured_bytes: int
    allowed_bytes: int
    judged: bool = True
    """False where nobody has measured before what the plan assumes: shown only."""

    @property
    def difference_bytes(self) -> int:
        """Measured minus planned."""
        return self.measured_bytes - self.planned_bytes

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance, or cannot be judged."""
        return not self.judged or abs(self.difference_bytes) <= self.allowed_bytes

    def to_json(self) -> dict[str, Any]:
        """The check in schema 1."""
        return {
            "rank": self.rank,
            "component": self.component,
            "planned_bytes": self.planned_bytes,
            "measured_bytes": self.measured_bytes,
            "difference_bytes": self.difference_bytes,
            "allowed_bytes": self.allowed_bytes,
            "judged": self.judged,
            "ok": self.ok,
        }


def with_measured(plan: Plan, measured: Mapping[int, Mapping[str, int]]) -> Plan:
    """The plan with `measured_bytes` filled in; `measured` is by rank and component."""
    ranks = tuple(
        replace(
            rank,
            components=tuple(
                replace(component, measured_bytes=measured[rank.rank].get(component.name))
                for component in rank.components
            ),
        )
        for rank in plan.ranks
    )
    return replace(plan, ranks=ranks)


def compare(
    plan: Plan, resident: Mapping[int, int], tolerance: float | None = None
) -> tuple[Check, ...]:
    """Judge every measured component, and the total of every rank.

    Args:
        plan: with measured bytes.
        resident: the most memory that each rank held.
        tolerance: of components that are not exact, and on a CPU of totals, as a fraction; by
            default that of the device.
    """
    on_gpu = plan.device is not None and plan.device.kind != "cpu"
    judge = _Judge(
        tolerance=tolerance or (GPU_TOLERANCE if on_gpu else CPU_TOLERANCE),
        slack_bytes=GPU_SLACK_BYTES if on_gpu else OTHER_SLACK_BYTES,
        total_bytes=int(plan.device.total_bytes * TOTAL_TOLERANCE)
        if on_gpu and plan.device is not None
        else None,
    )
    return tuple(_checks(plan, resident, judge))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """What may differ: a fraction of a component or a slack, and so much of the total."""

    tolerance: float
    slack_bytes: int
    total_bytes: int | None

    def of_component(self, name: str, planned: int) -> int:
        if name in ("weights", "kv_cache"):
            return max(int(planned * EXACT_TOLERANCE), EXACT_SLACK_BYTES)
        return max(int(planned * self.tolerance), self.slack_bytes)

    def of_total(self, planned: int) -> int:
        return int(planned * self.tolerance) if self.total_bytes is None else self.total_bytes


def _checks(plan: Plan, resident: Mapping[int, int], judge: _Judge) -> Iterator[Check]:
    for rank in plan.ranks:
        surprise = 0
        for component in rank.components:
            if component.measured_bytes is None:
                continue
            planned = component.planned_bytes
            # Nobody has measured this version of torch, or this code of others: neither the
            # component nor the total can be blamed.
            judged = component.detail.keys().isdisjoint((OTHER_VERSION, ESTIMATED))
            if not judged:
                surprise += component.measured_bytes - planned
            yield Check(
                rank=rank.rank,
                component=component.name,
                planned_bytes=planned,
                measured_bytes=component.measured_bytes,
                allowed_bytes=judge.of_component(component.name, planned),
                judged=judged,
            )
        if rank.rank in resident:
            total = surprise + sum(component.planned_bytes for component in rank.components)
            yield Check(
                rank=rank.rank,
                component="total",
                planned_bytes=total,
                measured_bytes=resident[rank.rank],
                allowed_bytes=judge.of_total(total),
            )
