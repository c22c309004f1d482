"""How many sequences of each length fit at once: the map of context length and concurrency.

The pool is that of the plan. A sequence of a length draws from it the blocks that its engine
reserves (`KVLayout.blocks`), which for sliding windows and state-space layers is not proportional
to the length: that is why the map is computed here, where the layout is known, and not from the
figures of one sequence.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from tightfit.model.spec import ModelSpec
from tightfit.planner.kv_cache import KVLayout
from tightfit.planner.options import Option, PlanOptions
from tightfit.planner.plan import Plan

_DOUBLINGS = 7
_SHORTEST = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class FitMap:
    """Blocks of a sequence for some lengths, and the pool from which they come."""

    pool_blocks: int
    """Blocks that sequences can have."""
    max_num_seqs: int
    lengths: tuple[int, ...]
    """Tokens, ascending; the plan's own `max_model_len` is among them."""
    blocks_per_sequence: tuple[int, ...]
    """Of one sequence of each length, on the rank that needs most."""

    @property
    def sequences(self) -> tuple[int, ...]:
        """How many sequences of each length fit at once, at most `max_num_seqs`."""
        return tuple(
            min(self.pool_blocks // blocks, self.max_num_seqs) if blocks else self.max_num_seqs
            for blocks in self.blocks_per_sequence
        )

    def to_json(self) -> dict[str, Any]:
        """What `write_report` takes as `grid`."""
        return {
            "pool_blocks": self.pool_blocks,
            "max_num_seqs": self.max_num_seqs,
            "lengths": list(self.lengths),
            "blocks_per_sequence": list(self.blocks_per_sequence),
            "sequences": list(self.sequences),
        }


def fit_map(
    plan: Plan,
    layouts: Callable[[int], Iterable[KVLayout]],
    *,
    limit: int,
    held_back_blocks: int = 0,
) -> FitMap | None:
    """The map of a plan; None if no device says how large the pool is.

    Args:
        plan: whose pool and options hold.
        layouts: the KV layouts of the ranks when `max_model_len` is the length given.
        limit: the longest context that the model allows.
        held_back_blocks: blocks of the pool that no sequence can have.
    """
    if plan.kv_cache.num_blocks is None:
        return None
    asked = plan.options.max_model_len.value
    lengths = map_lengths(asked, limit)
    return FitMap(
        pool_blocks=max(plan.kv_cache.num_blocks - held_back_blocks, 0),
        max_num_seqs=plan.options.max_num_seqs.value,
        lengths=lengths,
        blocks_per_sequence=tuple(
            max(layout.blocks(length) for layout in set(layouts(length))) for length in lengths
        ),
    )


def map_lengths(asked: int, limit: int) -> tuple[int, ...]:
    """Powers of two up to the longest context, that context, and the length of the plan."""
    limit = max(limit, asked)
    shortest = min(_SHORTEST, limit)
    powers = [1 << n for n in range(limit.bit_length()) if shortest <= 1 << n < limit]
    return tuple(sorted({*powers[-_DOUBLINGS:], limit, asked}))


def map_plan(spec: ModelSpec, options: PlanOptions, plan: Plan) -> FitMap | None:
    """The map of a plan that `make_plan(spec, options)` made.

    Raises:
        TightfitError: what `make_plan` raises.
    """
    from tightfit.planner.assemble import engine

    chosen = engine(options)
    ranks = list(chosen.parallel(options).ranks())

    def layouts(length: int) -> list[KVLayout]:
        asked = Option(value=length, origin=plan.options.max_model_len.origin)
        resolved = replace(plan.options, max_model_len=asked)
        return [chosen.kv_layout(spec, rank, resolved) for rank in ranks]

    return fit_map(
        plan, layouts, limit=chosen.longest(spec), held_back_blocks=chosen.held_back_blocks
    )
