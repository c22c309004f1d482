"""MiniMax-M3's attention: an index of small queries and one key chooses blocks of tokens.

Keys and values of all tokens are kept, as in full attention. vLLM (`models/minimax_m3/` and
`layers/linear.py: MinimaxM3QKVParallelLinearWithIndexer`) fuses the index into the projection: its
queries are dealt like KV heads, its key is whole on every rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.base import Place
from tightfit.model.blocks.linear import norm
from tightfit.model.cache import Cache, CacheKind, TokenCache
from tightfit.model.layout import Axis, Part, Rank, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSparseAttention(Attention):
    """Attention to the best `topk_blocks` of `sparse_block_size` tokens, by an index."""

    index_dim: int
    topk_blocks: int
    sparse_block_size: int

    def weights(self, place: Place) -> Iterator[Weight]:
        """Those of attention, the index's projections in `qkv_proj`, and its two norms."""
        at = place.inside(self.module)
        queries = Axis(
            label="num_key_value_heads",
            units=self.num_kv_heads,
            unit_rows=self.index_dim,
            groups=self.num_kv_heads,
            replicated=True,
        )
        key = Axis(
            label="the index key", units=1, unit_rows=self.index_dim, groups=1, replicated=True
        )
        index = tuple(
            Part(source=f"{at.prefix}.index_{name}_proj.weight", rows=axis.rows, axis=axis)
            for name, axis in (("q", queries), ("k", key))
        )
        for weight in Attention.weights(self, place):
            fused = weight.name.endswith(".qkv_proj.weight")
            yield replace(weight, parts=(*weight.parts, *index)) if fused else weight
        for name in ("q", "k"):
            yield from norm(f"{at.prefix}.index_{name}_norm", self.index_dim, place.where)

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """Keys and values, and the index's key in bfloat16, alike on every rank."""
        key = TokenCache(kind=CacheKind.INDEXER, slots=1, key_size=self.index_dim, dtype="BF16")
        return (*Attention.caches(self, rank), key)
