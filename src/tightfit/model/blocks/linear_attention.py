"""Lightning attention: linear attention with a fixed decay for each head.

MiniMax-Text-01; the cut is that of vLLM's `layers/mamba/linear/minimax_linear_attn.py`, the state
that of `mamba_utils.py` (`linear_attention_state_shape`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.base import Mixer, Place
from tightfit.model.blocks.linear import column_parallel, row_parallel
from tightfit.model.blocks.mamba import dealt
from tightfit.model.cache import Cache, State, StateCache
from tightfit.model.layout import Axis, Rank, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LightningAttention(Mixer):
    """Queries, keys and values of as many heads, a norm over all of them, and a gate."""

    num_heads: int
    head_dim: int
    module: str = "self_attn"

    def weights(self, place: Place) -> Iterator[Weight]:
        """`qkv_proj`, whose rows are queries, keys and values head by head."""
        at, where, hidden = place.inside(self.module), place.where, place.hidden_size
        inner, fused = self._heads(self.head_dim), self._heads(3 * self.head_dim)
        yield from column_parallel(f"{at.prefix}.qkv_proj", fused, columns=hidden, where=where)
        yield from column_parallel(f"{at.prefix}.output_gate", inner, columns=hidden, where=where)
        yield dealt(f"{at.prefix}.norm.weight", inner, where)
        yield from row_parallel(f"{at.prefix}.out_proj", inner, rows=hidden, where=where)

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """A matrix for each head."""
        shape = (self._heads(1).span(rank)[1], self.head_dim, self.head_dim)
        return (StateCache(kind="linear_attention", states=(State(shape=shape, role="ssm"),)),)

    def _heads(self, unit_rows: int) -> Axis:
        return Axis(label="num_attention_heads", units=self.num_heads, unit_rows=unit_rows)
