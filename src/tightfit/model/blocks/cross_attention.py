"""Attention to an encoder's output, and the attention of Whisper, whose keys have no bias."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.base import Mixer, Place
from tightfit.model.blocks.linear import column_parallel, linear, row_parallel, stack, vector
from tightfit.model.cache import Cache, CacheKind, TokenCache
from tightfit.model.layout import Axis, Cut, Part, Rank, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysWithoutBias(Attention):
    """Queries and values have a bias; vLLM fuses them with zeros for the keys."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """Those of `Attention`, with zeros in the middle of the fused bias."""
        for weight in Attention.weights(self, place):
            yield zero_bias(weight, 1) if weight.name.endswith(".qkv_proj.bias") else weight


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossAttention(Mixer):
    """Queries of the decoder, keys and values of the encoder (vLLM's `models/whisper.py`).

    As many KV heads as query heads; queries and values have biases, keys have zeros.
    """

    num_heads: int
    head_dim: int
    module: str = "encoder_attn"

    def weights(self, place: Place) -> Iterator[Weight]:
        """`q_proj`, the fused `kv_proj`, and `out_proj`."""
        at, heads = place.inside(self.module).prefix, self._heads
        hidden, where = place.hidden_size, place.where
        yield from column_parallel(f"{at}.q_proj", heads, columns=hidden, where=where, bias=True)
        for weight in linear(
            f"{at}.kv_proj",
            stack(at, None, (("k_proj", heads), ("v_proj", heads))),
            columns=hidden,
            cut=Cut.OUTPUT,
            where=where,
            bias=True,
        ):
            yield zero_bias(weight, 0) if weight.name.endswith(".bias") else weight
        yield from row_parallel(f"{at}.out_proj", heads, rows=hidden, where=where, bias=True)

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """Keys and values of every token of the encoder."""
        heads = self._heads.span(rank)[1] // self.head_dim
        return (
            TokenCache(
                kind=CacheKind.CROSS, slots=heads, key_size=self.head_dim, value_size=self.head_dim
            ),
        )

    @property
    def _heads(self) -> Axis:
        return Axis(label="decoder_attention_heads", units=self.num_heads, unit_rows=self.head_dim)


def zero_bias(weight: Weight, index: int) -> Weight:
    """A fused bias of which one part is zeros, because the checkpoint has none.

    The part names a neighbour's tensor, of which it takes no rows.
    """
    parts = list(weight.parts)
    neighbour, part = parts[index - 1], parts[index]
    parts[index] = Part(source=neighbour.source, rows=0, axis=part.axis, source_rows=neighbour.rows)
    return replace(weight, parts=tuple(parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedCrossAttention(Mixer):
    """Grouped attention to image features, with gates before both residuals: Llama 3.2 Vision."""

    attention: Attention

    def weights(self, place: Place) -> Iterator[Weight]:
        """Those of the attention, and the two gates."""
        yield from self.attention.weights(place)
        for name in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
            yield vector(f"{place.prefix}.{name}", 1, place.where)

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """Keys and values of every feature of the images."""
        own = self.attention.caches(rank)
        return tuple(
            replace(cache, kind=CacheKind.CROSS) for cache in own if isinstance(cache, TokenCache)
        )
