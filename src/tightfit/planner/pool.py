"""What a rank holds whatever the size of its pool, and the pool that remains for the KV cache."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from tightfit.model.layout import Parallel, Rank
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import Device
from tightfit.planner.engines.base import Engine
from tightfit.planner.kv_cache import KVLayout
from tightfit.planner.options import Resolved
from tightfit.planner.plan import Component


class Fixed(NamedTuple):
    """What a rank holds whatever the size of its pool."""

    rank: Rank
    components: tuple[Component, ...]
    kv: KVLayout

    @property
    def total_bytes(self) -> int:
        """What the budget pays for before any pool."""
        return sum(c.planned_bytes for c in self.components if c.inside_budget)

    @property
    def resident_bytes(self) -> int:
        """What of it the device holds once the engine has started, inside the budget or not."""
        return sum(component.resident_bytes for component in self.components)

    @property
    def peak_bytes(self) -> int:
        """The most of it that the device has to hold at a time, less what torch only caches."""
        cached = (c.resident_bytes for c in self.components if c.name == "allocator_cache")
        return max(self.total_bytes, self.resident_bytes - sum(cached))

    def corrected(self, measured: Mapping[str, int]) -> "Fixed":
        """With what the user's own start-ups have taught."""
        return self._replace(
            components=tuple(
                component
                if not (more := measured.get(component.name))
                else replace(
                    component,
                    planned_bytes=max(0, component.planned_bytes + more),
                    origin="calibrated",
                    formula=f"{component.formula}; {more:+,} by your own start-up",
                )
                for component in self.components
            )
        )

    @classmethod
    def of(
        cls, spec: ModelSpec, rank: Rank, weights: Component, engine: Engine, resolved: Resolved
    ) -> "Fixed":
        """Ask the engine for everything beside weights and pool."""
        components = (weights, *engine.components(spec, rank, resolved))
        return cls(rank, components, engine.kv_layout(spec, rank, resolved))


def all_fixed(
    spec: ModelSpec,
    parallel: Parallel,
    weights: Sequence[Component],
    engine: Engine,
    resolved: Resolved,
) -> list[Fixed]:
    """Ranks of a stage that hold as many bytes of weights hold as much of everything."""
    alike: dict[tuple[int, int], Fixed] = {}
    fixed: list[Fixed] = []
    for rank, component in zip(parallel.ranks(), weights, strict=True):
        key = rank.pp_rank, component.planned_bytes
        if key not in alike:
            alike[key] = Fixed.of(spec, rank, component, engine, resolved)
        one = alike[key]
        fixed.append(one._replace(rank=rank, components=(component, *one.components[1:])))
    return fixed


class Pool(NamedTuple):
    """The KV pool: the rank with the fewest blocks decides for all."""

    budget_bytes: int | None
    worst: Fixed
    available_bytes: int | None
    usable_blocks: int
    num_blocks: int | None
    limit_bytes: int | None = None
    """Of a pool whose size the user gave: what its rank may hold, which is all of the device."""
    excess_bytes: int = 0
    """What the device lacks for everything that the engine holds, inside the budget or not."""
    free_bytes: int | None = None
    """What is free when the engine starts, if its budget is more."""
    refusal: str = ""
    """The engine's words for that."""

    def holds(self, length: int) -> bool:
        """Whether one sequence of `length` tokens fits."""
        if self.excess_bytes or self.free_bytes is not None:
            return False
        return self.worst.kv.blocks(length) <= self.usable_blocks


def pool_of(
    device: Device | None,
    parallel: Parallel,
    engine: Engine,
    resolved: Resolved,
    fixed: list[Fixed],
) -> Pool:
    """The pool that the budget leaves, or of the size that the user gave."""
    explicit: int | None = resolved.kv_cache_memory_bytes.value
    budget = None if device is None else engine.budget_bytes(device, parallel, resolved)
    if budget is None and explicit is None:
        worst = max(fixed, key=lambda one: one.total_bytes)
        return Pool(None, worst, None, 0, None)

    def available(one: Fixed) -> int:
        if explicit is not None:
            return explicit
        assert budget is not None
        return budget - one.total_bytes

    worst = min(fixed, key=lambda one: available(one) // one.kv.bytes_per_block)
    left = available(worst)
    fitting = max(left, 0) // worst.kv.bytes_per_block
    blocks = engine.pool_blocks(fitting, worst.kv, resolved)
    if resolved.asked.num_gpu_blocks_override is not None:
        left = blocks * worst.kv.bytes_per_block
    usable = max(blocks - engine.held_back_blocks, 0)
    if device is None:
        return Pool(budget, worst, left, usable, blocks)
    free = min(engine.free_bytes(device, one.components) for one in fixed)
    if budget is not None and budget > free:
        words = engine.not_free(free, device, resolved)
        return Pool(budget, worst, left, usable, blocks, free_bytes=free, refusal=words)
    if not resolved.pool_is_given and not (engine.models_driver and blocks):
        return Pool(budget, worst, left, usable, blocks)
    # A pool of a given size is allocated whatever the budget is, until memory ends; and what is
    # outside the budget may be more than the utilization leaves.
    limit = device.total_bytes // (parallel.world_size if device.kind == "cpu" else 1)
    largest = max(one.peak_bytes + blocks * one.kv.bytes_per_block for one in fixed)
    excess = max(largest - limit, 0)
    given = limit if resolved.pool_is_given else None
    return Pool(budget, worst, left, usable, blocks, given, excess)
