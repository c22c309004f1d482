"""Attention over the paged KV cache: what layers ask for, and what backends know of them.

An `AttentionBackend` looks at a batch once per step; what it returns is called by every layer.
`runtime.sdpa` runs everywhere, `runtime.paged_attention` on GPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tightfit.model.blocks.attention import Attention, head_axes
from tightfit.model.blocks.base import Mixer
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.cache import TokenCache
from tightfit.model.layout import Rank
from tightfit.model.spec import ModelSpec
from tightfit.runtime.attention.kv_cache import attending_layers
from tightfit.runtime.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionLayer:
    """What a backend has to know of one layer, with the heads of this rank.

    Latent attention is one KV head that all query heads share: keys are the latent and the rotated
    key, and values the latent, which is the beginning of the keys.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    """Tokens that are seen, the current one included; None sees all."""
    softcap: float | None = None
    """Scores become `softcap * tanh(scores / softcap)`."""
    sinks: Tensor | None = None
    """A logit for each head, float32 [heads], that takes its share of every softmax."""
    k_scale: float = 1.0
    """What the keys of a float8_e4m3fn cache are multiplied by."""
    v_scale: float = 1.0
    """The same of its values."""

    @property
    def explicit(self) -> bool:
        """Whether scores are stored here, since PyTorch's kernel for CPUs cannot do it."""
        odd = self.softcap is not None or self.sinks is not None
        return odd or self.value_dim != self.head_dim


def attention_layers(
    spec: ModelSpec, rank: Rank, tensors: Mapping[str, Tensor]
) -> tuple[AttentionLayer, ...]:
    """What backends have to know of the layers of a rank, whose parameters are `tensors`."""
    return tuple(
        attention_layer(spec.layers[i].mixers[0], rank, tensors, f"{spec.names.layers}.{i}")
        for i in attending_layers(spec, rank)
    )


def attention_layer(
    mixer: Mixer, rank: Rank, tensors: Mapping[str, Tensor], prefix: str
) -> AttentionLayer:
    """The same of one layer, whose parameters' names begin with `prefix`."""
    (cache,) = mixer.caches(rank)
    assert isinstance(cache, TokenCache)
    if isinstance(mixer, LatentAttention):
        return AttentionLayer(
            heads=mixer.heads(1).span(rank)[1],
            kv_heads=cache.slots,
            head_dim=cache.key_size,
            value_dim=mixer.kv_lora_rank if mixer.absorbed else cache.value_size,
            scale=mixer.scale,
        )
    assert isinstance(mixer, Attention)
    sinks = tensors.get(f"{prefix}.{mixer.module}.{mixer.names.sinks}")
    return AttentionLayer(
        heads=head_axes(mixer)[0].span(rank)[1] // mixer.head_dim,
        kv_heads=cache.slots,
        head_dim=cache.key_size,
        value_dim=cache.value_size,
        scale=mixer.scale,
        window=mixer.window,
        softcap=mixer.softcap,
        sinks=None if sinks is None else sinks.float(),
    )


class Attend(Protocol):
    """One step's attention, for any layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, and attend to the whole sequence.

        Args:
            layer: index of the layer among those that attend.
            q: [tokens, heads, head_dim].
            k: [tokens, kv_heads, head_dim].
            v: [tokens, kv_heads, value_dim].

        Returns:
            [tokens, heads * value_dim].
        """
        ...

    def latent(self, layer: int, q: Tensor, latent: Tensor) -> Tensor:
        """Store the new latents, and attend to those of the whole sequence.

        Args:
            layer: index of the layer among those that attend.
            q: queries that absorbed the projection of keys, [tokens, heads, head_dim].
            latent: the latent and the rotated key, [tokens, head_dim].

        Returns:
            [tokens, heads, value_dim]: latents, to be projected to values.
        """
        ...


class AttentionBackend(Protocol):
    """Prepares what all layers of one step share."""

    report: tuple[str, ...]
    """Which kernels were chosen, and why others were not: a line each, if there was a choice."""

    def step(self, batch: Batch) -> Attend:
        """Look at the batch once."""
        ...
