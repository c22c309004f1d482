"""What a start-up of vLLM logged, as checks of its plan."""

from collections.abc import Iterator

from tightfit.planner.plan import Plan
from tightfit.planner.vllm_log import VLLMLog, compare
from tightfit.runtime.checks import (
    EXACT_TOLERANCE,
    GPU_SLACK_BYTES,
    GPU_TOLERANCE,
    TOTAL_TOLERANCE,
    Check,
)

_GIVEN = frozenset({"device", "budget", "one_sequence", "longest_that_fits"})
"""What the device and the options say: nothing that vLLM measures."""
_TOTALS = frozenset({"non_kv_total", "available_kv"})


def checks_of(plan: Plan, log: VLLMLog, tolerance: float | None = None) -> tuple[Check, ...]:
    """Judge every figure that the log has, of the rank that decides.

    Args:
        plan: for vLLM.
        log: of a start-up with the plan's options.
        tolerance: of components, as a fraction; totals may differ by 1 % of the device.
    """
    return tuple(_checks(plan, log, GPU_TOLERANCE if tolerance is None else tolerance))


def _checks(plan: Plan, log: VLLMLog, tolerance: float) -> Iterator[Check]:
    device_bytes = plan.device.total_bytes if plan.device else 0
    for line in compare(plan, log):
        if line.planned is None or line.logged is None or line.name in _GIVEN:
            continue
        planned, logged = line.planned, line.logged
        if line.name == "kv_tokens":
            # Of a pool whose size was given there is no other line.
            pool = max(rank.component("kv_cache").planned_bytes for rank in plan.ranks)
            yield Check(
                rank=0,
                component="kv_cache",
                planned_bytes=pool,
                measured_bytes=round(pool * logged / planned) if planned else 0,
                allowed_bytes=max(int(pool * EXACT_TOLERANCE), _rounding(plan)),
            )
        elif line.unit == "bytes":
            allowed = max(planned * tolerance, GPU_SLACK_BYTES)
            if line.name in _TOTALS:
                allowed = device_bytes * TOTAL_TOLERANCE
            yield Check(
                rank=0,
                component=line.name,
                planned_bytes=round(planned),
                measured_bytes=round(logged),
                allowed_bytes=int(allowed),
            )


def _rounding(plan: Plan) -> int:
    """A pool that takes what remains differs as much as everything else together."""
    if plan.options.kv_cache_memory_bytes.value is not None or plan.device is None:
        return plan.kv_cache.bytes_per_block
    return int(plan.device.total_bytes * TOTAL_TOLERANCE)
