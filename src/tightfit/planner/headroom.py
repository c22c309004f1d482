"""How far a plan is from its limit, in one number.

The measure is one sequence of `max_model_len`: what the KV cache of the tightest rank has beyond
it, or lacks.
"""

from tightfit.planner.plan import Plan, RankPlan


def spare_bytes(plan: Plan) -> int:
    """KV memory of the tightest rank beyond one sequence of max_model_len; negative if it lacks.

    A pool of the user's size counts as it is. Without a device this is minus what a rank needs.
    """
    needed = plan.kv_cache.reserved_bytes
    if plan.options.pool_is_given:
        return (plan.kv_cache.available_bytes or 0) - needed
    return min(_left(rank) - _needed(plan, rank) for rank in plan.ranks)


def shortage_bytes(plan: Plan) -> int:
    """What the tightest rank lacks to serve one sequence; negative is room to spare."""
    shortage = -spare_bytes(plan)
    if plan.options.pool_is_given:
        rooms = [rank.headroom_bytes for rank in plan.ranks if rank.headroom_bytes is not None]
        shortage = max(shortage, -min(rooms, default=0))
    return shortage


def _left(rank: RankPlan) -> int:
    """What the budget leaves to the pool."""
    held = rank.total_bytes - rank.component("kv_cache").planned_bytes
    return (rank.budget_bytes or 0) - held


def _needed(plan: Plan, rank: RankPlan) -> int:
    """Bytes of one sequence on this rank, whose blocks may be smaller than the worst rank's."""
    kv = plan.kv_cache
    pool_bytes = rank.component("kv_cache").planned_bytes
    if not kv.num_blocks:
        return kv.reserved_bytes if kv.num_blocks == 0 else pool_bytes
    return kv.reserved_bytes // kv.bytes_per_block * (pool_bytes // kv.num_blocks)
