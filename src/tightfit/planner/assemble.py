"""Put a plan together: weights, the engine's own components, and the KV cache from what remains."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from tightfit.errors import UsageError
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import check_parallel, parameter_count
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import Device
from tightfit.planner.engines.base import Engine
from tightfit.planner.kv_cache import KVLayout
from tightfit.planner.options import Option, PlanOptions, Resolved
from tightfit.planner.plan import Component, KVPlan, ModelSummary, Plan, RankPlan, Verdict
from tightfit.planner.resolve import model_max_len
from tightfit.planner.weights import checkpoint_bytes, weights_component
from tightfit.units import format_bytes


def engine(options: PlanOptions) -> Engine:
    """The engine that the options name.

    Raises:
        UsageError: no such engine.
    """
    if options.engine == "vllm":
        from tightfit.planner.engines.vllm import VLLM

        return VLLM(options.device, options.engine_version)
    if options.engine == "builtin":
        from tightfit.planner.engines.builtin import Builtin

        return Builtin(options.device, tokenizer_json_bytes=options.tokenizer_json_bytes)
    raise UsageError(f"unknown --engine {options.engine!r}", hint="vllm or builtin")


def make_plan(
    spec: ModelSpec, options: PlanOptions, *, name: str, from_headers: bool = False
) -> Plan:
    """Plan the memory of every rank.

    Raises:
        LayoutError: the model cannot be cut that way.
        UsageError: options that contradict each other or the model.
    """
    chosen = engine(options)
    summary = _summary(spec, name, from_headers=from_headers)
    spec = _adapted(_Adaptation.of(spec, chosen, options))
    parallel = chosen.parallel(options)
    _check_parallel(spec, parallel)
    dtype = chosen.resolve(spec, options).dtype.value
    weights = [_on_device(spec, rank, dtype, chosen, options) for rank in parallel.ranks()]
    pools: dict[int, _Pool] = {}

    def attempt(length: int | None) -> _Attempt:
        asked = replace(options, max_model_len=length)
        resolved = chosen.resolve(spec, asked)
        fixed = _all_fixed(spec, parallel, weights, chosen, resolved)
        pool = _pool(options.device, parallel, chosen, resolved, fixed)
        pools[resolved.max_model_len.value] = pool
        return _Attempt(resolved, fixed, pool)

    def holds(length: int) -> bool:
        pool = pools.get(length) or attempt(length).pool
        return pool.holds(length)

    resolved, fixed, pool = attempt(options.max_model_len)
    limit = max(model_max_len(spec), resolved.max_model_len.value)
    longest = None if pool.num_blocks is None else _longest(holds, pool, limit)
    if options.max_model_len == -1 and longest is not None:
        resolved, fixed, pool = attempt(max(longest, 1))
        fitted = Option(value=max(longest, 1), origin="fitted")
        resolved = replace(resolved, max_model_len=fitted)
    return Plan(
        model=summary,
        engine=chosen.name,
        engine_version=chosen.version,
        entrypoint=options.entrypoint,
        device=options.device,
        options=resolved,
        ranks=tuple(_rank_plan(one, pool, resolved, chosen) for one in fixed),
        kv_cache=_kv_plan(pool, resolved),
        verdict=_verdict(pool, chosen, resolved.max_model_len.value, longest),
        not_modelled=chosen.not_modelled,
        warnings=spec.notes,
    )


class _Adaptation(NamedTuple):
    """What decides how an engine builds a model; a key of a cache."""

    spec: ModelSpec
    engine: str
    quantization: str | None
    media: str
    make: Callable[[], ModelSpec]

    @classmethod
    def of(cls, spec: ModelSpec, chosen: Engine, options: PlanOptions) -> "_Adaptation":
        limits = sorted(options.limit_mm_per_prompt.items(), key=repr)
        media = f"{limits} {options.language_model_only} {options.mm_encoder_tp_mode}"
        name = f"{chosen.name} {chosen.version}"
        return cls(spec, name, options.quantization, media, lambda: chosen.adapt(spec, options))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Adaptation) and self[:4] == other[:4]

    def __hash__(self) -> int:
        return hash(self[:4])


@lru_cache(maxsize=64)
def _adapted(adaptation: _Adaptation) -> ModelSpec:
    return adaptation.make()


def _on_device(
    spec: ModelSpec, rank: Rank, dtype: str, chosen: Engine, options: PlanOptions
) -> Component:
    """A rank's weights, less what the engine keeps on the host."""
    whole = _weights(spec, rank, dtype)
    moved = chosen.offloaded_bytes(spec, rank, options, dtype)
    if not moved:
        return whole
    return replace(
        whole,
        planned_bytes=whole.planned_bytes - moved,
        formula=f"{whole.formula}, less {moved:,} that are offloaded to the host",
        detail={**whole.detail, "offloaded_bytes": moved},
    )


# A sweep asks the same of the same model again and again.
_weights = lru_cache(maxsize=1024)(weights_component)
_check_parallel = lru_cache(maxsize=64)(check_parallel)


@lru_cache(maxsize=8)
def _summary(spec: ModelSpec, name: str, *, from_headers: bool) -> ModelSummary:
    return ModelSummary(
        name=name,
        architecture=spec.architecture,
        params=parameter_count(spec),
        checkpoint_bytes=checkpoint_bytes(spec),
        weights_origin=spec.listed_from or ("headers" if from_headers else "shapes"),
    )


class _Fixed(NamedTuple):
    """What a rank holds whatever the size of its pool."""

    rank: Rank
    components: tuple[Component, ...]
    kv: KVLayout

    @property
    def total_bytes(self) -> int:
        return sum(c.planned_bytes for c in self.components if c.inside_budget)

    @property
    def resident_bytes(self) -> int:
        """What of it the device holds once the engine has started, inside the budget or not."""
        return sum(component.resident_bytes for component in self.components)

    @property
    def peak_bytes(self) -> int:
        """The most of it that the device has to hold at a time."""
        return max(self.total_bytes, self.resident_bytes)

    @classmethod
    def of(
        cls, spec: ModelSpec, rank: Rank, weights: Component, engine: Engine, resolved: Resolved
    ) -> "_Fixed":
        components = (weights, *engine.components(spec, rank, resolved))
        return cls(rank, components, engine.kv_layout(spec, rank, resolved))


def _all_fixed(
    spec: ModelSpec,
    parallel: Parallel,
    weights: Sequence[Component],
    engine: Engine,
    resolved: Resolved,
) -> list[_Fixed]:
    """Ranks of a stage that hold as many bytes of weights hold as much of everything."""
    alike: dict[tuple[int, int], _Fixed] = {}
    fixed: list[_Fixed] = []
    for rank, component in zip(parallel.ranks(), weights, strict=True):
        key = rank.pp_rank, component.planned_bytes
        if key not in alike:
            alike[key] = _Fixed.of(spec, rank, component, engine, resolved)
        one = alike[key]
        fixed.append(one._replace(rank=rank, components=(component, *one.components[1:])))
    return fixed


class _Pool(NamedTuple):
    """The KV pool: the rank with the fewest blocks decides for all."""

    budget_bytes: int | None
    worst: _Fixed
    available_bytes: int | None
    usable_blocks: int
    num_blocks: int | None
    limit_bytes: int | None = None
    """Of a pool whose size the user gave: what its rank may hold, which is all of the device."""
    excess_bytes: int = 0
    """What such a pool takes beyond that."""

    def holds(self, length: int) -> bool:
        """Whether one sequence of `length` tokens fits."""
        return not self.excess_bytes and self.worst.kv.blocks(length) <= self.usable_blocks


def _pool(
    device: Device | None,
    parallel: Parallel,
    engine: Engine,
    resolved: Resolved,
    fixed: list[_Fixed],
) -> _Pool:
    explicit: int | None = resolved.kv_cache_memory_bytes.value
    budget = None if device is None else engine.budget_bytes(device, parallel, resolved)
    if budget is None and explicit is None:
        worst = max(fixed, key=lambda one: one.total_bytes)
        return _Pool(None, worst, None, 0, None)

    def available(one: _Fixed) -> int:
        if explicit is not None:
            return explicit
        assert budget is not None
        return budget - one.total_bytes

    worst = min(fixed, key=lambda one: available(one) // one.kv.bytes_per_block)
    blocks = max(available(worst), 0) // worst.kv.bytes_per_block
    blocks = engine.pool_blocks(blocks, worst.kv, resolved)
    usable = max(blocks - engine.held_back_blocks, 0)
    if explicit is None or device is None:
        return _Pool(budget, worst, available(worst), usable, blocks)
    # A pool of a given size is allocated whatever the budget is, until memory ends.
    limit = device.total_bytes // (parallel.world_size if device.kind == "cpu" else 1)
    largest = max(one.peak_bytes + blocks * one.kv.bytes_per_block for one in fixed)
    excess = max(largest - limit, 0)
    return _Pool(budget, worst, available(worst), usable, blocks, limit, excess)


class _Attempt(NamedTuple):
    """A plan for one context length."""

    resolved: Resolved
    fixed: list[_Fixed]
    pool: _Pool


def _longest(fits: Callable[[int], bool], pool: _Pool, limit: int) -> int:
    """The longest context, up to `limit`, that fits when all else is planned for it as well.

    What is left for the pool may depend on the length; where it does not, the first guess is right.
    """
    guess = pool.worst.kv.longest(pool.usable_blocks, limit)
    low, high = 0, limit
    if guess == 0 or fits(guess):
        low = guess
        if guess == limit or not fits(guess + 1):
            return guess
    else:
        high = guess - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _rank_plan(one: _Fixed, pool: _Pool, resolved: Resolved, engine: Engine) -> RankPlan:
    length = resolved.max_model_len.value
    block_bytes = one.kv.bytes_per_block
    if pool.num_blocks is None:
        blocks = one.kv.blocks(length)
        reason = f"{blocks:,} blocks for one sequence of {length:,} tokens"
    else:
        blocks = pool.num_blocks
        reason = f"{blocks:,} blocks, as many as every rank can hold"
    kv_cache = Component(
        name="kv_cache",
        planned_bytes=blocks * block_bytes,
        origin="derived",
        formula=f"{reason}, of {one.kv.block_size} tokens and {block_bytes:,} bytes each",
    )
    weights, *others = one.components
    return RankPlan(
        rank=one.rank.rank,
        pp_rank=one.rank.pp_rank,
        tp_rank=one.rank.tp_rank,
        components=(weights, kv_cache, *others),
        budget_bytes=pool.budget_bytes
        if pool.limit_bytes is None
        else pool.limit_bytes - (one.peak_bytes - one.total_bytes),
        driver_used_bytes=one.resident_bytes + blocks * block_bytes
        if engine.models_driver and pool.num_blocks is not None
        else None,
    )


def _kv_plan(pool: _Pool, resolved: Resolved) -> KVPlan:
    kv = pool.worst.kv
    length = resolved.max_model_len.value
    reserved = kv.blocks(length)
    concurrency = None if pool.num_blocks is None else pool.num_blocks / reserved
    return KVPlan(
        dtype=resolved.kv_cache_dtype.value,
        block_size=kv.block_size,
        bytes_per_block=kv.bytes_per_block,
        bytes_per_token=kv.bytes_per_token,
        available_bytes=None if pool.available_bytes is None else max(pool.available_bytes, 0),
        num_blocks=pool.num_blocks,
        tokens=None if concurrency is None else int(concurrency * length),
        max_concurrency=concurrency,
        minimum_bytes=kv.minimum_bytes(length),
        reserved_bytes=reserved * kv.bytes_per_block,
        all_full_bytes=kv.all_full_bytes(length),
    )


def _verdict(pool: _Pool, engine: Engine, length: int, longest: int | None) -> Verdict:
    kv = pool.worst.kv
    needed = kv.blocks(length) * kv.bytes_per_block
    if pool.num_blocks is None or longest is None:
        total = pool.worst.total_bytes + needed
        return Verdict(
            fits=None,
            reason=f"no device given: a rank needs {format_bytes(total)} for one sequence of "
            f"{length:,} tokens",
        )
    assert pool.available_bytes is not None
    if pool.excess_bytes:
        size, excess = format_bytes(pool.available_bytes), format_bytes(pool.excess_bytes)
        return Verdict(
            fits=False,
            reason=f"with a KV cache of {size} a rank needs {excess} more than its device has",
            engine_message=engine.out_of_memory,
            max_model_len_that_fits=longest,
        )
    if pool.holds(length):
        sequences = pool.num_blocks / kv.blocks(length)
        reason = (
            f"{format_bytes(pool.num_blocks * kv.bytes_per_block)} for the KV cache of a rank, "
            f"{sequences:.2f} sequences of {length:,} tokens at once"
        )
        return Verdict(fits=True, reason=reason, max_model_len_that_fits=longest)
    # What no sequence can have is not left, as in the engine's own message.
    usable_bytes = pool.available_bytes - engine.held_back_blocks * kv.bytes_per_block
    if usable_bytes <= 0:
        held = format_bytes(pool.worst.total_bytes)
        reason = f"a rank holds {held} before any KV cache"
        if pool.budget_bytes is not None:
            reason += f", and its budget is {format_bytes(pool.budget_bytes)}"
    else:
        reason = (
            f"one sequence of {length:,} tokens needs {format_bytes(needed)} of KV cache, and "
            f"{format_bytes(usable_bytes)} are left"
        )
    return Verdict(
        fits=False,
        reason=reason,
        engine_message=engine.refusal(needed, usable_bytes, longest, length),
        max_model_len_that_fits=longest,
    )
