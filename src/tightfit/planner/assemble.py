"""Put a plan together: weights, the engine's own components, and the KV cache from what remains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from tightfit.errors import UsageError
from tightfit.model.layout import Rank
from tightfit.model.parameters import check_parallel, parameter_count
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import Device
from tightfit.planner.engines.base import Deployed, Engine
from tightfit.planner.options import Option, PlanOptions, Resolved
from tightfit.planner.plan import Component, ModelSummary, Plan
from tightfit.planner.pool import Fixed, Pool, all_fixed, pool_of
from tightfit.planner.quantized import as_written, stored_bytes
from tightfit.planner.verdict import kv_plan, rank_plan, verdict_of
from tightfit.planner.weights import weights_component
from tightfit.units import format_bytes


def engine(options: PlanOptions) -> Engine:
    """The engine that the options name.

    Raises:
        UsageError: no such engine.
    """
    if options.engine == "vllm" and options.device is not None and options.device.kind == "cpu":
        from tightfit.planner.engines.vllm_cpu import VLLMCPU

        return VLLMCPU(options)
    if options.engine == "vllm":
        from tightfit.planner.engines.vllm import VLLM

        return VLLM(options.device, options.engine_version)
    if options.engine == "builtin":
        from tightfit.planner.engines.builtin import Builtin

        return Builtin(options.device, tokenizer_json_bytes=options.tokenizer_json_bytes)
    raise UsageError(f"unknown --engine {options.engine!r}", hint="vllm or builtin")


def make_plan(
    spec: ModelSpec,
    options: PlanOptions,
    *,
    name: str,
    checkpoint_bytes: int | None = None,
    measured: Mapping[str, int] | None = None,
) -> Plan:
    """Plan the memory of every rank.

    Args:
        spec: the model.
        options: what the user asked for.
        name: of the model, for the reader.
        checkpoint_bytes: of all tensors of the checkpoint, if its headers were read.
        measured: bytes to add to components, which the user's own start-ups have taught.

    Raises:
        LayoutError: the model cannot be cut that way.
        UsageError: options that contradict each other or the model.
    """
    chosen = engine(options)
    from_headers = checkpoint_bytes is not None
    if checkpoint_bytes is None:
        checkpoint_bytes = stored_bytes(spec, options)
    spec = as_written(spec, options)
    summary = _summary(spec, name, checkpoint_bytes, from_headers=from_headers)
    spec = _adapted(spec, chosen, options)
    parallel = chosen.parallel(options)
    _check_parallel(spec, parallel)
    first = chosen.resolve(spec, options)
    chosen.check(spec, first)
    dtype = first.dtype.value
    weights = [_on_device(spec, rank, dtype, chosen, options) for rank in parallel.ranks()]
    pools: dict[int, Pool] = {}

    def attempt(length: int | None) -> _Attempt:
        asked = replace(options, max_model_len=length)
        resolved = chosen.resolve(spec, asked)
        fixed = all_fixed(spec, parallel, weights, chosen, resolved)
        if measured:
            fixed = [one.corrected(measured) for one in fixed]
        pool = pool_of(options.device, parallel, chosen, resolved, fixed)
        pools[resolved.max_model_len.value] = pool
        return _Attempt(resolved, fixed, pool)

    def holds(length: int) -> bool:
        pool = pools.get(length) or attempt(length).pool
        return pool.holds(length)

    resolved, fixed, pool = attempt(options.max_model_len)
    limit = max(chosen.longest(spec), resolved.max_model_len.value)
    longest = None if pool.num_blocks is None else _longest(holds, pool, limit)
    if options.max_model_len == -1 and longest is not None:
        length = max(min(longest, resolved.max_model_len.value), 1)
        resolved, fixed, pool = attempt(length)
        fitted = Option(value=length, origin="fitted")
        resolved = replace(resolved, max_model_len=fitted)
    host = _host(chosen, spec, resolved, fixed, pool, summary)
    warnings = [
        *chosen.warnings,
        *spec.notes,
        *([_MEASURED] if measured else []),
        *_crowded(options.device, host),
    ]
    return Plan(
        model=summary,
        engine=chosen.name,
        engine_version=chosen.version,
        entrypoint=options.entrypoint,
        device=options.device,
        options=resolved,
        ranks=tuple(rank_plan(one, pool, resolved, chosen) for one in fixed),
        kv_cache=kv_plan(pool, resolved, chosen),
        verdict=verdict_of(pool, chosen, resolved.max_model_len.value, longest),
        host=host,
        not_modelled=chosen.not_modelled,
        warnings=tuple(warnings),
    )


_MEASURED = "corrected by your own start-up of this model, version, device and layout"


def _crowded(device: Device | None, host: Sequence[Component]) -> list[str]:
    """On CPUs every rank takes its share of a node; ranks on one node would take it together."""
    if device is None or device.kind != "cpu" or not host:
        return []
    from tightfit.planner.host import needed_bytes

    needed = needed_bytes(host)
    if needed <= device.total_bytes:
        return []
    return [
        f"all processes need {format_bytes(needed)}, and one node has "
        f"{format_bytes(device.total_bytes)}: give every rank a node of its own, or set "
        "--kv-cache-memory-bytes"
    ]


def _host(
    chosen: Engine,
    spec: ModelSpec,
    resolved: Resolved,
    fixed: list[Fixed],
    pool: Pool,
    summary: ModelSummary,
) -> tuple[Component, ...]:
    weights = [one.components[0] for one in fixed]
    offloaded = [component.detail.get("offloaded_bytes", 0) for component in weights]
    blocks = pool.num_blocks or pool.worst.kv.blocks(resolved.max_model_len.value)
    deployed = Deployed(
        weights_by_rank=[
            component.planned_bytes + moved
            for component, moved in zip(weights, offloaded, strict=True)
        ],
        offloaded_by_rank=offloaded,
        checkpoint_bytes=summary.checkpoint_bytes,
        pool_bytes=blocks * pool.worst.kv.bytes_per_block,
        kv=pool.worst.kv,
    )
    return chosen.host(spec, resolved, deployed)


_ADAPTED: dict[tuple[object, ...], ModelSpec] = {}
_MOST_ADAPTED = 64


def _adapted(spec: ModelSpec, chosen: Engine, options: PlanOptions) -> ModelSpec:
    """The model as the engine builds it, made once for all that decides how."""
    limits = tuple(sorted(options.limit_mm_per_prompt.items(), key=repr))
    media = repr(limits), options.language_model_only, options.mm_encoder_tp_mode
    built = chosen.name, chosen.version, chosen.parallel(options)
    key = (spec, built, options.quantization, media)
    if key not in _ADAPTED:
        if len(_ADAPTED) >= _MOST_ADAPTED:
            _ADAPTED.clear()
        _ADAPTED[key] = chosen.adapt(spec, options)
    return _ADAPTED[key]


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
def _summary(spec: ModelSpec, name: str, nbytes: int, *, from_headers: bool) -> ModelSummary:
    return ModelSummary(
        name=name,
        architecture=spec.architecture,
        params=parameter_count(spec),
        checkpoint_bytes=nbytes,
        weights_origin=spec.listed_from or ("headers" if from_headers else "shapes"),
        is_encoder_decoder=spec.encoder_tokens > 0,
    )


class _Attempt(NamedTuple):
    """A plan for one context length."""

    resolved: Resolved
    fixed: list[Fixed]
    pool: Pool


def _longest(fits: Callable[[int], bool], pool: Pool, limit: int) -> int:
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
