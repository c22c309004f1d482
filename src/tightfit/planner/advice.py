"""What to do when a model does not fit, or when it should fit better.

Every remedy of vLLM's page "Conserving memory" and more is tried by planning again with that one
change. What it saves is by how much it reduces the shortage of the tightest rank: what one sequence
of max_model_len needs beyond what is left for the KV cache. So a remedy that frees memory and one
that needs less of it are measured alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tightfit.errors import TightfitError
from tightfit.planner.headroom import shortage_bytes
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Advice, Plan
from tightfit.planner.remedies import Remedy, Step, remedies

Replan = Callable[[PlanOptions], Plan]

_NEARLY = 0.8


def advise(plan: Plan, options: PlanOptions, replan: Replan) -> tuple[Advice, ...]:
    """Rank the remedies: first those that alone make the plan fit, then by what they save.

    Args:
        plan: the plan to improve.
        options: what it was made from.
        replan: makes a plan of the same model from other options.
    """
    if options.max_model_len == -1:
        # Otherwise every saving would be spent on a longer context at once.
        options = replace(options, max_model_len=plan.options.max_model_len.value)
    shortage = shortage_bytes(plan)
    found: dict[str, Advice] = {}
    for remedy in remedies(plan, options, shortage):
        advice = _best(remedy, plan, options, shortage, replan)
        if advice is not None:
            found.setdefault(advice.change, advice)
    host = sorted(_host_advice(plan, options, replan), key=lambda one: -one.saves_bytes)
    ranked = sorted(found.values(), key=lambda one: (not _cures(plan, one), -one.saves_bytes))
    return (*ranked, *host)


def _cures(plan: Plan, advice: Advice) -> bool:
    return plan.verdict.fits is False and advice.fits is True


def _best(
    remedy: Remedy, plan: Plan, options: PlanOptions, shortage: int, replan: Replan
) -> Advice | None:
    """The mildest step that makes it fit, or that saves nearly as much as any if none does.

    Where it fits already, the mildest that saves anything.
    """
    tried: list[Advice] = []
    for step in remedy.steps:
        after = _replanned(options, step, replan)
        if after is None or not _possible(plan, after):
            continue
        saved = shortage - shortage_bytes(after)
        if saved <= 0:
            continue
        advice = Advice(
            change=step.change,
            saves_bytes=saved,
            costs=step.costs or remedy.costs,
            fits=after.verdict.fits,
        )
        if plan.verdict.fits is not False or after.verdict.fits:
            return advice
        tried.append(advice)
    most = max((one.saves_bytes for one in tried), default=0)
    return next((one for one in tried if one.saves_bytes >= _NEARLY * most), None)


def _replanned(options: PlanOptions, step: Step, replan: Replan) -> Plan | None:
    try:
        return replan(replace(options, **step.options))
    except TightfitError:
        # Advice is an addition: a remedy that is refused must not cost the plan.
        return None


def _possible(before: Plan, after: Plan) -> bool:
    """Whether what would fit is more than the device has, once everything outside is counted."""
    if after.device is None or after.device.kind == "cpu" or not after.verdict.fits:
        return True
    return _driver_used(after) <= max(after.device.total_bytes, _driver_used(before))


def _driver_used(plan: Plan) -> int:
    return max((rank.driver_used_bytes or 0 for rank in plan.ranks), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _HostRemedy:
    change: str
    options: dict[str, Any]
    costs: str


def _host_remedies(options: PlanOptions) -> Iterator[_HostRemedy]:
    if options.mm_processor_cache_gb != 0:
        yield _HostRemedy(
            change="--mm-processor-cache-gb 0",
            options={"mm_processor_cache_gb": 0.0},
            costs="saves memory of the host: images that come again are processed again",
        )
    if options.load_format == "auto":
        yield _HostRemedy(
            change="--load-format sharded_state",
            options={"load_format": "sharded_state"},
            costs="saves memory of the host: after `tightfit shard` a rank reads only its own",
        )


def _host_advice(plan: Plan, options: PlanOptions, replan: Replan) -> Iterator[Advice]:
    held = sum(component.planned_bytes for component in plan.host)
    for remedy in _host_remedies(options) if held else ():
        step = Step(change=remedy.change, options=remedy.options)
        after = _replanned(options, step, replan)
        saved = held - sum(c.planned_bytes for c in after.host) if after is not None else 0
        if after is not None and saved > 0:
            yield Advice(
                change=remedy.change,
                saves_bytes=saved,
                costs=remedy.costs,
                fits=after.verdict.fits,
            )
