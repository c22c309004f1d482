"""Multi-head latent attention (DeepSeek V2): keys and values are projected from one small latent.

Parameters and cuts are those of vLLM's `models/deepseek_v2.py` and `models/deepseek_v32/`. An
engine that absorbs `kv_b_proj` into queries and outputs keeps only the latent and the rotated key,
alike on every rank; one that does not keeps whole heads. Sparse attention (DeepSeek V3.2) has an
indexer beside it, which chooses the tokens that queries see.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.attention import Rope
from tightfit.model.blocks.base import Mixer, Place
from tightfit.model.blocks.linear import (
    column_parallel,
    linear,
    norm,
    replicated,
    row_parallel,
    vector,
)
from tightfit.model.cache import Cache, CacheKind, TokenCache
from tightfit.model.layout import Axis, Cut, Part, Rank, Weight

_SCALE_BLOCK = 128
"""Index keys that share one float32 scale (vLLM's `quant_block_size`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexer:
    """The lightning indexer: `num_heads` small queries score one quantized key of each token."""

    num_heads: int
    head_dim: int
    topk: int
    """Tokens that it lets each query see."""
    rope: Rope
    """Its own table: it may pair features otherwise than the attention does."""

    @property
    def key_bytes(self) -> int:
        """Bytes of a cached key: fp8 features, and a float32 scale for each 128 of them."""
        return self.head_dim + self.head_dim // _SCALE_BLOCK * 4

    def weights(self, at: Place, q_lora_rank: int) -> Iterator[Weight]:
        """`wq_b`, `wk` fused with `weights_proj`, and the norm of keys; whole on every rank.

        `wk_weights_proj` stays in the model's dtype, whatever the checkpoint holds.
        """
        yield from replicated(
            f"{at.prefix}.wq_b",
            rows=self.num_heads * self.head_dim,
            columns=q_lora_rank,
            where=at.where,
        )
        members = (("wk", self.head_dim), ("weights_proj", self.num_heads))
        yield Weight(
            name=f"{at.prefix}.wk_weights_proj.weight",
            parts=tuple(Part(source=f"{at.prefix}.{n}.weight", rows=rows) for n, rows in members),
            columns=at.hidden_size,
            where=at.where,
        )
        for kind in ("weight", "bias"):
            yield vector(f"{at.prefix}.k_norm.{kind}", self.head_dim, at.where, "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention(Mixer):
    """MLA; `q_lora_rank` is None where queries come straight from the hidden state (V2-Lite)."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: Rope | None
    """None where `qk_rope_head_dim` is only a name: Kimi Linear."""
    scale: float
    """What scores are multiplied by: qk_head_dim ** -0.5, and yarn's correction."""
    absorbed: bool = True
    """vLLM keeps the latent, and copies of `kv_b_proj` for it; MiniCPM3 keeps whole heads."""
    index_topk: int | None = None
    """Tokens that a query sees; None sees all."""
    indexer: Indexer | None = None
    """Absent also from sparse layers that reuse an earlier layer's choice."""
    module: str = "self_attn"

    @property
    def qk_head_dim(self) -> int:
        """Features of a query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_size(self) -> int:
        """Features that are kept of a token: the latent and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def heads(self, features: int) -> Axis:
        """How heads of so many features go to ranks: evenly, for there are no KV heads to share."""
        return Axis(label="num_attention_heads", units=self.num_heads, unit_rows=features)

    def absorbed_elements(self, rank: Rank) -> int:
        """Elements of `W_UV` and `W_UK_T`, which vLLM copies out of `kv_b_proj` after loading.

        (`layers/attention/mla_attention.py: process_weights_after_loading`; the original stays.)

        Raises:
            LayoutError: the heads cannot be dealt to that many ranks.
        """
        if not self.absorbed:
            return 0
        return self.heads(self.qk_nope_head_dim + self.v_head_dim).span(rank)[1] * self.kv_lora_rank

    def weights(self, place: Place) -> Iterator[Weight]:
        """The small projections whole on every rank, those that make heads dealt by head."""
        at, where, rank = place.inside(self.module), place.where, self.q_lora_rank
        queries = self.heads(self.qk_head_dim)
        latent = ("kv_a_proj_with_mqa", self.latent_size)
        if rank is None:
            yield from self._down(at, latent[0], latent)
            yield from column_parallel(
                f"{at.prefix}.q_proj", queries, columns=at.hidden_size, where=where
            )
        else:
            if self.absorbed:
                yield from self._down(at, "fused_qkv_a_proj", ("q_a_proj", rank), latent)
            else:
                yield from self._down(at, "q_a_proj", ("q_a_proj", rank))
                yield from self._down(at, latent[0], latent)
            yield from norm(f"{at.prefix}.q_a_layernorm", rank, where)
            yield from column_parallel(f"{at.prefix}.q_b_proj", queries, columns=rank, where=where)
        yield from norm(f"{at.prefix}.kv_a_layernorm", self.kv_lora_rank, where)
        yield from column_parallel(
            f"{at.prefix}.kv_b_proj",
            self.heads(self.qk_nope_head_dim + self.v_head_dim),
            columns=self.kv_lora_rank,
            where=where,
        )
        yield from row_parallel(
            f"{at.prefix}.o_proj", self.heads(self.v_head_dim), rows=at.hidden_size, where=where
        )
        if self.indexer is not None:
            assert rank is not None
            yield from self.indexer.weights(at.inside("indexer"), rank)

    def _down(self, at: Place, name: str, *members: tuple[str, int]) -> Iterator[Weight]:
        return linear(
            f"{at.prefix}.{name}",
            lambda kind: tuple(
                Part(source=f"{at.prefix}.{member}.{kind}", rows=rows) for member, rows in members
            ),
            columns=at.hidden_size,
            cut=Cut.NONE,
            where=at.where,
            bias=False,
        )

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """The latent, whole on every rank, and the indexer's keys; or heads, values padded."""
        local = self.heads(1).span(rank)[1]
        if not self.absorbed:
            size = self.qk_head_dim
            return (TokenCache(slots=local, key_size=size, value_size=size),)
        latent = TokenCache(kind=CacheKind.LATENT, slots=1, key_size=self.latent_size)
        if self.indexer is None:
            return (latent,)
        size = self.indexer.key_bytes
        return latent, TokenCache(kind=CacheKind.INDEXER, slots=1, key_size=size, dtype="U8")
