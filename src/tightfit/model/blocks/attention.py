"""Attention with grouped KV heads: one fused projection, its norms, the output projection."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from tightfit.model.blocks.base import Mixer, Place
from tightfit.model.blocks.linear import Parts, linear, stack, vector
from tightfit.model.cache import Cache, TokenCache
from tightfit.model.layout import Axis, Cut, Part, Rank, Weight


class QKNorm(Enum):
    """Whether queries and keys are normalized, and over what."""

    NONE = "none"
    HEAD = "head"
    """Each head by itself, one weight of head_dim: Qwen3, Gemma 3."""
    FULL = "full"
    """All heads together, a weight per feature: OLMo 2. Not separable by rank."""
    DEALT = "dealt"
    """As FULL, but a rank has only the weights of its heads: MiniMax-M2."""
    MATRIX = "matrix"
    """As DEALT, but each head is normalized by itself: `[heads, head_dim]`, Command-R+."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: base, rotated features, and the scaling as its config gives it."""

    theta: float
    rotary_dim: int
    scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    """`rope_type` and its factors, or None for the plain kind."""
    max_position_embeddings: int
    interleaved: bool = False
    """Features are paired with their neighbours, not with those half a head away."""
    dtype: str | None = None
    """Of its table, where the engine does not take the model's: gpt-oss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projections:
    """What a checkpoint calls the matrices of an attention module.

    `fused` names one tensor that holds queries, keys and values as rows in that order. A `value`
    named like the `key` is the same matrix: Gemma 4.
    """

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused: str | None = None
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    sinks: str = "sinks"
    transposed: bool = False
    """Stored as `[in, out]`: GPT-2's Conv1D."""
    by_group: bool = False
    """The fused tensor has the query heads, key and value of one KV head after the other."""
    by_head: bool = False
    """An engine deals its rows as they are: GPT-NeoX, which has them head by head, and Qwen2-VL,
    which has not, and gathers them before it looks for heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(Mixer):
    """Multi-head attention with grouped KV heads: full, sliding or in chunks."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    scale: float
    """What scores are multiplied by, usually head_dim ** -0.5."""
    window: int | None = None
    """Tokens that a sliding layer sees, the current one included; None sees all."""
    more_window: int = 0
    """Tokens that vLLM keeps beyond the window: Command-R7B."""
    chunk: int | None = None
    """Tokens of a chunk, where attention sees only its own; None sees all."""
    value_dim: int | None = None
    """Features of a value head, where they differ from head_dim."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QKNorm = QKNorm.NONE
    qk_norm_bias: bool = False
    """The norms of each head have a bias too: Persimmon."""
    softcap: float | None = None
    """Scores become `softcap * tanh(scores / softcap)`."""
    sinks: bool = False
    """A learned logit per head that takes attention from every token: gpt-oss."""
    alibi: bool = False
    """Scores fall with distance, at a rate of each head's own, where there is no rope: BLOOM."""
    norms_after_rope: bool = False
    """Queries and keys are rotated before they are normalized: HunYuan."""
    output_gate: bool = False
    """Queries come with as many features that gate the output: Qwen3-Next."""
    shares_cache: bool = False
    """Reads the keys and values of an earlier layer, and keeps none: Gemma 3n."""
    split_pairs: bool = False
    """vLLM holds the even features of a head of queries or keys before its odd ones: Llama 4."""
    module: str = "self_attn"
    names: Projections = Projections()

    @property
    def v_dim(self) -> int:
        """Features of a value head."""
        return self.value_dim or self.head_dim

    def weights(self, place: Place) -> Iterator[Weight]:
        """`qkv_proj`, `o_proj`, the norms of queries and keys, and the sinks."""
        at, names = place.inside(self.module), self.names
        queries, keys = head_axes(self)
        values = value_axis(self)
        q = gated_axis(queries) if self.output_gate else queries
        members: tuple[tuple[str, Axis], ...]
        members = ((names.query, q), (names.key, keys), (names.value, values))
        if names.by_head:
            assert names.fused is not None
            assert self.num_kv_heads == self.num_heads
            members = ((names.fused, replace(queries, unit_rows=3 * self.head_dim)),)
        stacked = stack(
            at.prefix,
            None if names.by_head else names.fused,
            members[:1] if self.shares_cache else members,
            groups=self.num_kv_heads if names.by_group else 1,
        )
        yield from linear(
            f"{at.prefix}.{'q_proj' if self.shares_cache else 'qkv_proj'}",
            self._split(stacked) if self.split_pairs else stacked,
            columns=place.hidden_size,
            cut=Cut.OUTPUT,
            bias=self.qkv_bias,
            where=place.where,
            transposed=names.transposed,
        )
        inner = output_axis(self)
        yield from linear(
            f"{at.prefix}.o_proj",
            lambda kind: (
                Part(source=f"{at.prefix}.{names.output}.{kind}", rows=place.hidden_size),
            ),
            columns=inner.rows,
            cut=Cut.INPUT,
            input_axis=inner,
            bias=self.output_bias,
            where=place.where,
            transposed=names.transposed,
        )
        if self.qk_norm is not QKNorm.NONE:
            for name, axis in ((names.query_norm, queries), (names.key_norm, keys)):
                if axis is keys and self.shares_cache:
                    continue
                yield self._norm(f"{at.prefix}.{name}.weight", axis, place)
                if self.qk_norm_bias:
                    yield vector(f"{at.prefix}.{name}.bias", self.head_dim, place.where)
        if self.sinks:
            name = f"{at.prefix}.{names.sinks}"
            heads = Axis(label=queries.label, units=self.num_heads, groups=self.num_kv_heads)
            part = Part(source=name, rows=self.num_heads, axis=heads)
            yield Weight(name=name, parts=(part,), cut=Cut.OUTPUT, where=place.where)

    def _split(self, parts: Parts) -> Parts:
        def split(kind: str) -> tuple[Part, ...]:
            queries, keys, *others = parts(kind)
            return *(replace(part, paired=self.head_dim) for part in (queries, keys)), *others

        return split

    def _norm(self, name: str, axis: Axis, place: Place) -> Weight:
        if self.qk_norm in (QKNorm.DEALT, QKNorm.MATRIX):
            part = Part(source=name, rows=axis.rows, axis=axis)
            matrix = (axis.units, self.head_dim) if self.qk_norm is QKNorm.MATRIX else None
            return Weight(
                name=name,
                parts=(part,),
                cut=Cut.OUTPUT,
                where=place.where,
                stored_shape=matrix,
            )
        size = axis.rows if self.qk_norm is QKNorm.FULL else self.head_dim
        return vector(name, size, place.where)

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """Keys and values of the rank's KV heads."""
        if self.shares_cache:
            return ()
        heads = head_axes(self)[1].span(rank)[1] // self.head_dim
        return (
            TokenCache(
                slots=heads,
                key_size=self.head_dim,
                value_size=self.v_dim,
                window=None if self.window is None else self.window + self.more_window,
                chunk=self.chunk,
            ),
        )


def head_axes(attention: Attention) -> tuple[Axis, Axis]:
    """How query heads and KV heads go to ranks; an element is one feature of a head."""
    kv_heads = attention.num_kv_heads
    queries = Axis(
        label="num_attention_heads",
        units=attention.num_heads,
        unit_rows=attention.head_dim,
        groups=kv_heads,
    )
    keys = Axis(
        label="num_key_value_heads",
        units=kv_heads,
        unit_rows=attention.head_dim,
        groups=kv_heads,
        replicated=True,
    )
    return queries, keys


def value_axis(attention: Attention) -> Axis:
    """How the value heads go to ranks."""
    return Axis(
        label="num_key_value_heads",
        units=attention.num_kv_heads,
        unit_rows=attention.v_dim,
        groups=attention.num_kv_heads,
        replicated=True,
    )


def output_axis(attention: Attention) -> Axis:
    """The inputs of the output projection: a value head's features for every query head."""
    return Axis(
        label="num_attention_heads",
        units=attention.num_heads,
        unit_rows=attention.v_dim,
        groups=attention.num_kv_heads,
    )


def gated_axis(queries: Axis) -> Axis:
    """Query heads, each followed by its gate."""
    return Axis(
        label=queries.label,
        units=queries.units,
        unit_rows=2 * queries.unit_rows,
        groups=queries.groups,
    )
