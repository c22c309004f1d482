"""The most that fits: the longest context, the most sequences, or the smallest devices.

What is searched for is whatever the user left open, in this order: the device, the length, the
number of sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tightfit.errors import TightfitError, UsageError
from tightfit.planner.devices import CATALOGUE, Device
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan

Replan = Callable[[PlanOptions], Plan]

SIZES = (1, 2, 4, 8)
"""Tensor parallel sizes that are tried on each device of the catalogue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """So many devices of one kind, of all replicas, on which the model fits."""

    device: Device
    count: int
    plan: Plan

    @property
    def total_bytes(self) -> int:
        """Memory of all the devices."""
        return self.count * self.device.total_bytes

    def to_json(self) -> dict[str, Any]:
        """The candidate in schema 1."""
        kv = self.plan.kv_cache
        return {
            "gpu": self.device.name,
            "count": self.count,
            "total_bytes": self.total_bytes,
            "kv_cache": {"tokens": kv.tokens, "max_concurrency": kv.max_concurrency},
            "max_model_len_that_fits": self.plan.verdict.max_model_len_that_fits,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What was searched for, what was found, and the plan with it."""

    what: str
    """`gpu`, `max_model_len` or `max_num_seqs`."""
    value: str | int | None
    """None if nothing fits."""
    options: PlanOptions
    plan: Plan
    candidates: tuple[Candidate, ...] = ()

    @property
    def sentence(self) -> str:
        """The result in words."""
        length = self.plan.options.max_model_len.value
        if self.value is None:
            return f"no {self.what} fits"
        if self.what == "gpu":
            count = self.candidates[0].count
            return f"the smallest that fits: {count} × {self.value}"
        if self.what == "max_model_len":
            return f"the longest context that fits: --max-model-len {self.value}"
        return (
            f"the most sequences: --max-num-seqs {self.value}, each of which can have "
            f"{length:,} tokens at the same time; more would wait for blocks"
        )

    def to_json(self) -> dict[str, Any]:
        """The result in schema 1."""
        return {
            "what": self.what,
            "value": self.value,
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }


def fit(options: PlanOptions, replan: Replan, *, sizes: Sequence[int] = SIZES) -> Fitted:
    """Search for what the options leave open.

    Args:
        options: of the plan; without a device one is chosen from the catalogue.
        replan: makes a plan of the model from options.
        sizes: tensor parallel sizes that may be chosen with a device.

    Raises:
        TightfitError: the model cannot be planned at all.
    """
    if options.device is None:
        return _smallest_devices(options, replan, sizes)
    if options.max_model_len in (None, -1):
        options = replace(options, max_model_len=-1)
        plan = replan(options)
        longest = plan.verdict.max_model_len_that_fits or 0
        if longest > plan.options.max_model_len.value:
            # The engine itself does not go so far unless it is told.
            options = replace(options, max_model_len=longest)
            plan = replan(options)
        value = plan.options.max_model_len.value if plan.verdict.fits else None
        return Fitted(what="max_model_len", value=value, options=options, plan=plan)
    if options.max_num_seqs is not None:
        raise UsageError(
            "--fit has nothing to find: --max-model-len and --max-num-seqs are both given",
            hint="leave one of them out",
        )
    return _most_sequences(options, replan)


def _most_sequences(options: PlanOptions, replan: Replan) -> Fitted:
    def attempt(count: int) -> Plan | None:
        try:
            plan = replan(replace(options, max_num_seqs=count))
        except UsageError:
            return None
        fits = plan.verdict.fits and (plan.kv_cache.max_concurrency or 0) >= count
        return plan if fits else None

    low, best = 0, replan(replace(options, max_num_seqs=1))
    high = int(best.kv_cache.max_concurrency or 0) if best.verdict.fits else 0
    while low < high:
        middle = (low + high + 1) // 2
        plan = attempt(middle)
        if plan is None:
            high = middle - 1
        else:
            low, best = middle, plan
    return Fitted(
        what="max_num_seqs",
        value=low or None,
        options=replace(options, max_num_seqs=max(low, 1)),
        plan=best,
    )


def _smallest_devices(options: PlanOptions, replan: Replan, sizes: Sequence[int]) -> Fitted:
    """The fewest devices of each kind, the smallest total first."""
    least: dict[int, int] = {}
    dtype, failure = "", None
    for size in sizes:
        try:
            plan = replan(replace(options, tensor_parallel_size=size))
        except TightfitError as error:
            failure = failure or error
            continue
        dtype = plan.options.dtype.value
        # Weights and one sequence: what a device needs whatever its defaults are.
        least[size] = plan.kv_cache.minimum_bytes + max(
            rank.component("weights").planned_bytes for rank in plan.ranks
        )
    if not least:
        assert failure is not None
        raise failure
    found: list[Candidate] = []
    for device in CATALOGUE.values():
        if dtype == "BF16" and not device.bfloat16:
            continue
        for size, bytes_needed in least.items():
            if bytes_needed > device.total_bytes or (size > 1 and device.alone):
                continue
            try:
                plan = replan(replace(options, device=device, tensor_parallel_size=size))
            except TightfitError:
                # No kernels for the model on it.
                continue
            if plan.verdict.fits:
                count = len(plan.ranks) * options.data_parallel_size
                found.append(Candidate(device=device, count=count, plan=plan))
                break
    found.sort(key=lambda one: (one.total_bytes, one.count))
    if found:
        best = found[0]
        chosen = replace(
            options,
            device=best.device,
            tensor_parallel_size=best.plan.options.tensor_parallel_size.value,
        )
        return Fitted(
            what="gpu",
            value=best.device.name,
            options=chosen,
            plan=best.plan,
            candidates=tuple(found),
        )
    largest = max(CATALOGUE.values(), key=lambda one: one.total_bytes)
    chosen = replace(options, device=largest, tensor_parallel_size=max(least))
    return Fitted(what="gpu", value=None, options=chosen, plan=replan(chosen))
