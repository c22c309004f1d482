"""What a plan says of each rank, of the KV cache, and of whether it fits."""

from tightfit.planner.engines.base import Engine
from tightfit.planner.kv_kinds import LayerKind
from tightfit.planner.options import Resolved
from tightfit.planner.plan import Component, KVPlan, RankPlan, Verdict
from tightfit.planner.pool import Fixed, Pool
from tightfit.units import format_bytes


def rank_plan(one: Fixed, pool: Pool, resolved: Resolved, engine: Engine) -> RankPlan:
    """The components of a rank, its pool among them."""
    length = resolved.max_model_len.value
    block_bytes = one.kv.bytes_per_block
    if pool.num_blocks is None:
        blocks = one.kv.blocks(length)
        reason = f"{blocks:,} blocks for one sequence of {length:,} tokens"
    else:
        blocks = pool.num_blocks
        reason = f"{blocks:,} blocks, as many as every rank can hold"
    layers = ", ".join(_described(kind, count) for kind, count in one.kv.layers)
    kv_cache = Component(
        name="kv_cache",
        planned_bytes=blocks * block_bytes,
        origin="derived",
        formula=f"{reason}, of {one.kv.block_size} tokens and {block_bytes:,} bytes each; {layers}",
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


def _described(kind: LayerKind, count: int) -> str:
    layers = f"{count} layers" if count > 1 else "1 layer"
    if kind.is_state:
        return f"{layers} of {kind.state_bytes:,} bytes a sequence"
    reach = kind.chunk if kind.window is None else kind.window
    local = "" if reach is None else f", of the last {reach:,}"
    tokens = "a token" if kind.tokens_per_row == 1 else f"for {kind.tokens_per_row} tokens"
    return f"{layers} of {kind.token_bytes:,} bytes {tokens}{local}"


def kv_plan(pool: Pool, resolved: Resolved, engine: Engine) -> KVPlan:
    """The KV cache in the engine's terms; the worst rank decides."""
    kv = pool.worst.kv
    length = resolved.max_model_len.value
    reserved = kv.blocks(length)
    blocks = pool.num_blocks
    return KVPlan(
        dtype=resolved.kv_cache_dtype.value,
        block_size=kv.block_size,
        bytes_per_block=kv.bytes_per_block,
        bytes_per_token=kv.bytes_per_token,
        available_bytes=None if pool.available_bytes is None else max(pool.available_bytes, 0),
        num_blocks=blocks,
        tokens=None if blocks is None else engine.cache_tokens(blocks, kv, length),
        max_concurrency=None if blocks is None else blocks / reserved,
        minimum_bytes=kv.minimum_bytes(length),
        reserved_bytes=reserved * kv.bytes_per_block,
        all_full_bytes=kv.all_full_bytes(length),
    )


def verdict_of(pool: Pool, engine: Engine, length: int, longest: int | None) -> Verdict:
    """Whether one sequence fits, why not, and what the engine would print."""
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
    if pool.free_bytes is not None:
        assert pool.budget_bytes is not None
        free, budget = format_bytes(pool.free_bytes), format_bytes(pool.budget_bytes)
        return Verdict(
            fits=False,
            reason=f"the budget is {budget}, and {free} are free when the engine starts: lower "
            "--gpu-memory-utilization",
            engine_message=pool.refusal,
            max_model_len_that_fits=longest,
        )
    if pool.excess_bytes:
        size, excess = format_bytes(pool.available_bytes), format_bytes(pool.excess_bytes)
        return Verdict(
            fits=False,
            reason=f"with a KV cache of {size} a rank needs {excess} more than its device has"
            + ("" if pool.limit_bytes else ", for what is outside its budget"),
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
