"""The Universal Speech Model's conformer in Gemma 3n and 4: whole on every rank in vLLM."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.errors import ConfigError
from tightfit.model.blocks.linear import norm, replicated, vector
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.base import Item, Media, Sizes, Tower, whole_number
from tightfit.model.towers.vit import WHERE, convolution, parameter

MEL_BINS = 128
FRAMES_PER_TOKEN = 4
"""Two convolutions halve the mel frames twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioClips(Media):
    """A clip becomes at most a fixed number of embeddings."""

    tokens: int

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """The longest clip; `audio_seq_length` of the processor says how many embeddings it has."""
        tokens = whole_number(processor, "audio_seq_length", self.tokens)
        inputs = tokens * FRAMES_PER_TOKEN * MEL_BINS
        return (Item(modality="audio", patches=tokens, tokens=tokens, inputs=inputs),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformer:
    """Its sizes, and what the two models call its parts."""

    hidden_size: int
    num_layers: int
    num_heads: int
    channels: tuple[int, int]
    kernel: int
    """Of the depthwise convolution."""
    linear: str
    """What follows the name of a linear layer: `.linear` in Gemma 4."""

    def matrix(self, name: str, rows: int, columns: int) -> Iterator[Weight]:
        """A linear layer without a bias."""
        yield from replicated(f"{name}{self.linear}", rows=rows, columns=columns, where=WHERE)

    def feed_forward(self, at: str) -> Iterator[Weight]:
        """Two linear layers between two norms."""
        size = self.hidden_size
        yield from self.matrix(f"{at}.ffw_layer_1", 4 * size, size)
        yield from self.matrix(f"{at}.ffw_layer_2", size, 4 * size)
        for name in ("pre_layer_norm", "post_layer_norm"):
            yield from norm(f"{at}.{name}", size, WHERE)

    def light_convolution(self, at: str) -> Iterator[Weight]:
        """A gated linear layer, a depthwise convolution, a linear layer."""
        size = self.hidden_size
        yield from self.matrix(f"{at}.linear_start", 2 * size, size)
        yield from self.matrix(f"{at}.linear_end", size, size)
        yield parameter(f"{at}.depthwise_conv1d.weight", size, 1, self.kernel)
        for name in ("pre_layer_norm", "conv_norm"):
            yield from norm(f"{at}.{name}", size, WHERE)

    def attention(self, at: str, positions: str) -> Iterator[Weight]:
        """Queries, keys and values, the projection of relative positions, a scale per feature."""
        size = self.hidden_size
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from self.matrix(f"{at}.{name}", size, size)
        yield from replicated(f"{at}.{positions}", rows=size, columns=size, where=WHERE)
        yield vector(f"{at}.per_dim_scale", size // self.num_heads, WHERE)

    def subsampling(self, at: str, layer: str) -> Iterator[Weight]:
        """Two convolutions, each with a norm, over time and mel bins; `layer` holds `{}`."""
        inputs = 1
        for i, outputs in enumerate(self.channels):
            name = f"{at}.{layer.format(i)}"
            yield from convolution(f"{name}.conv", rows=outputs, kernel=(inputs, 3, 3), bias=False)
            yield from norm(f"{name}.norm", outputs, WHERE)
            inputs = outputs
        bins = MEL_BINS // FRAMES_PER_TOKEN * self.channels[1]
        yield from replicated(
            f"{at}.input_proj_linear", rows=self.hidden_size, columns=bins, where=WHERE
        )

    def tower(
        self, weights: Callable[[], Iterator[Weight]], tokens: int, output_size: int
    ) -> Tower:
        """The tower with its projector's weights."""
        return Tower(
            modalities=("audio",),
            weights=tuple(weights()),
            media=AudioClips(tokens=tokens),
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            num_layers=self.num_layers,
            output_size=output_size,
        )


def conformer4(config: Config, text_hidden_size: int) -> Tower:
    """Gemma 4's, from an `audio_config`; 750 embeddings of 40 ms at most."""
    model = Conformer(
        hidden_size=config.integer("hidden_size", default=1024),
        num_layers=config.integer("num_hidden_layers", default=12, maximum=1000),
        num_heads=config.integer("num_attention_heads", default=8),
        channels=channel_pair(config, "subsampling_conv_channels"),
        kernel=config.integer("conv_kernel_size", default=5),
        linear=".linear",
    )
    outputs, size = config.integer("output_proj_dims", default=1536), model.hidden_size
    at = "model.audio_tower"

    def weights() -> Iterator[Weight]:
        yield from model.subsampling(f"{at}.subsample_conv_projection", "layer{}")
        for i in range(model.num_layers):
            layer = f"{at}.layers.{i}"
            for name in ("feed_forward1", "feed_forward2"):
                yield from model.feed_forward(f"{layer}.{name}")
            yield from model.attention(f"{layer}.self_attn", "relative_k_proj")
            yield from model.matrix(f"{layer}.self_attn.post", size, size)
            yield from model.light_convolution(f"{layer}.lconv1d")
            for name in ("norm_pre_attn", "norm_post_attn", "norm_out"):
                yield from norm(f"{layer}.{name}", size, WHERE)
        yield from replicated(
            f"{at}.output_proj", rows=outputs, columns=size, where=WHERE, bias=True
        )
        yield from replicated(
            "model.embed_audio.embedding_projection",
            rows=text_hidden_size,
            columns=outputs,
            where=WHERE,
        )

    return model.tower(weights, 750, text_hidden_size)


def channel_pair(config: Config, key: str) -> tuple[int, int]:
    """The channels of the two convolutions.

    Raises:
        ConfigError: there are not two.
    """
    channels = config.integers(key) or (128, 32)
    if len(channels) != 2 or min(channels) < 1:
        raise ConfigError(
            f"{config.name} has {key} = {channels!r}, which should be two positive numbers",
            hint="correct the config.json",
        )
    return channels[0], channels[1]
