"""DeepSeek V4's attention: a window of tokens, and rows that stand for 4 or 128 tokens each.

Keys and values are one vector of `head_dim`, alike for all heads and on every rank; heads are
projected back in groups. A compressor sums tokens to rows, of which layers of ratio 4 choose the
best by an indexer that has a compressor of its own. Parameters, cuts and caches are those of vLLM's
`models/deepseek_v4/{attention,compressor}.py` and `v1/attention/backends/mla/sparse_swa.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.attention import Rope
from tightfit.model.blocks.base import Block, Mixer, Place
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

OVERLAPPING = 4
"""The ratio whose rows overlap and are chosen by an indexer; others are all seen."""
_PACKED_ROW = 584
"""Bytes of a row in vLLM's `fp8_ds_mla`: 448 of fp8, 64 bfloat16 that are rotated, 8 of scales."""
_ALIGNMENT = 576
"""Bytes that pages of `fp8_ds_mla`, and all that share blocks with them, are padded to."""
_INDEX_SCALE = 4
_WINDOW_BLOCK = 64
_PARTIAL_BLOCKS = {4: 4, 128: 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressor:
    """Sums `ratio` tokens, weighed by learned gates and positions, to a row of `head_dim`."""

    ratio: int
    head_dim: int

    @property
    def width(self) -> int:
        """Features of a token's contribution; overlapping rows have two."""
        return self.head_dim * (2 if self.ratio == OVERLAPPING else 1)

    def weights(self, at: Place) -> Iterator[Weight]:
        """`ape` in float32, `wkv` fused with `wgate`, never quantized, and a norm."""
        name = f"{at.prefix}.ape"
        part = Part(source=name, rows=self.ratio)
        yield Weight(name=name, parts=(part,), columns=self.width, where=at.where, dtype="F32")
        yield Weight(
            name=f"{at.prefix}.fused_wkv_wgate.weight",
            parts=tuple(
                Part(source=f"{at.prefix}.{member}.weight", rows=self.width)
                for member in ("wkv", "wgate")
            ),
            columns=at.hidden_size,
            where=at.where,
        )
        yield from norm(f"{at.prefix}.norm", self.head_dim, at.where)

    def state(self) -> TokenCache:
        """Contributions and their weights of the tokens that rows are still made of, float32."""
        return TokenCache(
            kind=CacheKind.PARTIAL,
            slots=1,
            key_size=2 * self.width,
            window=self.ratio * self.width // self.head_dim,
            dtype="F32",
            block_size=_PARTIAL_BLOCKS[self.ratio],
            page_alignment=_ALIGNMENT,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedIndexer:
    """Small queries that score one key for each row, quantized with a scale as in V3.2."""

    num_heads: int
    topk: int
    compressor: Compressor

    def weights(self, at: Place, q_lora_rank: int) -> Iterator[Weight]:
        """`wq_b`, `weights_proj` in the model's dtype, and the compressor; whole on every rank."""
        rows = self.num_heads * self.compressor.head_dim
        yield from replicated(f"{at.prefix}.wq_b", rows=rows, columns=q_lora_rank, where=at.where)
        name = f"{at.prefix}.weights_proj.weight"
        part = Part(source=name, rows=self.num_heads)
        yield Weight(name=name, parts=(part,), columns=at.hidden_size, where=at.where)
        yield from self.compressor.weights(at.inside("compressor"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedAttention(Mixer):
    """Attention over a window, and over compressed rows unless the compressor is None."""

    num_heads: int
    head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    window: int
    rope: Rope
    scale: float
    compressor: Compressor | None = None
    index: CompressedIndexer | None = None
    module: str = "attn"

    def weights(self, place: Place) -> Iterator[Weight]:
        """`wq_a` fused with `wkv` whole on every rank; heads and groups of heads dealt."""
        at, where = place.inside(self.module), place.where
        heads = Axis(label="num_attention_heads", units=self.num_heads, unit_rows=self.head_dim)
        groups = Axis(label="o_groups", units=self.o_groups, unit_rows=self.o_lora_rank)
        sink = f"{at.prefix}.attn_sink"
        axis = Axis(label=heads.label, units=self.num_heads)
        part = Part(source=sink, rows=self.num_heads, axis=axis)
        yield Weight(name=sink, parts=(part,), cut=Cut.OUTPUT, where=where, dtype="F32")
        members = (("wq_a", self.q_lora_rank), ("wkv", self.head_dim))
        yield from linear(
            f"{at.prefix}.fused_wqa_wkv",
            lambda kind: tuple(
                Part(source=f"{at.prefix}.{name}.{kind}", rows=rows) for name, rows in members
            ),
            columns=at.hidden_size,
            cut=Cut.NONE,
            where=where,
            bias=False,
        )
        yield from norm(f"{at.prefix}.q_norm", self.q_lora_rank, where)
        yield from column_parallel(
            f"{at.prefix}.wq_b", heads, columns=self.q_lora_rank, where=where
        )
        yield from norm(f"{at.prefix}.kv_norm", self.head_dim, where)
        columns = self.num_heads * self.head_dim // self.o_groups
        yield from column_parallel(f"{at.prefix}.wo_a", groups, columns=columns, where=where)
        yield from row_parallel(f"{at.prefix}.wo_b", groups, rows=at.hidden_size, where=where)
        if self.index is not None:
            yield from self.index.weights(at.inside("indexer"), self.q_lora_rank)
        if self.compressor is not None:
            yield from self.compressor.weights(at.inside("compressor"))

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """The window, the rows, and what compressors have not finished; alike on every rank.

        Rows are vLLM's packed fp8, which FlashMLA demands (Hopper); a backend that keeps plain
        rows has `head_dim` features of the cache's dtype in place of 584 bytes.
        """
        self._check(rank)
        found = [
            TokenCache(
                kind=CacheKind.LATENT,
                slots=1,
                key_size=_PACKED_ROW,
                window=self.window,
                dtype="U8",
                block_size=_WINDOW_BLOCK,
                page_alignment=_ALIGNMENT,
            )
        ]
        if self.compressor is not None:
            found += _rows(self.compressor, CacheKind.LATENT, _PACKED_ROW)
        if self.index is not None:
            own = self.index.compressor
            found += _rows(own, CacheKind.INDEXER, own.head_dim + _INDEX_SCALE)
        return tuple(found)

    def _check(self, rank: Rank) -> None:
        Axis(label="num_attention_heads", units=self.num_heads).span(rank)
        Axis(label="o_groups", units=self.o_groups).span(rank)


def _rows(compressor: Compressor, kind: CacheKind, size: int) -> tuple[TokenCache, ...]:
    """What a compressor has finished, and what it has not."""
    ratio = compressor.ratio
    rows = TokenCache(
        kind=kind,
        slots=1,
        key_size=size,
        dtype="U8",
        tokens_per_row=ratio,
        page_alignment=_ALIGNMENT,
    )
    return rows, compressor.state()


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperConnections(Block):
    """Float32 mixes of the `streams` residual streams, before attention and before the experts."""

    streams: int

    def weights(self, place: Place) -> Iterator[Weight]:
        """`hc_{attn,ffn}_{fn,base,scale}`, whole on every rank."""
        rows = (2 + self.streams) * self.streams
        for name in ("attn", "ffn"):
            prefix = f"{place.prefix}.hc_{name}"
            yield Weight(
                name=f"{prefix}_fn",
                parts=(Part(source=f"{prefix}_fn", rows=rows),),
                columns=self.streams * place.hidden_size,
                where=place.where,
                dtype="F32",
            )
            yield vector(f"{prefix}_base", rows, place.where, "F32")
            yield vector(f"{prefix}_scale", 3, place.where, "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class HashTable(Block):
    """The experts of every token id, in layers that route by it and not by a score."""

    vocab_size: int
    top_k: int

    def weights(self, place: Place) -> Iterator[Weight]:
        """`tid2eid`, of 4 bytes in vLLM."""
        name = f"{place.prefix}.ffn.gate.tid2eid"
        part = Part(source=name, rows=self.vocab_size)
        where = place.where
        yield Weight(name=name, parts=(part,), columns=self.top_k, where=where, dtype="I32")
