"""Pixtral's vision encoder, with Mistral 3's merging projector or LLaVA's.

Sources: vLLM's `models/pixtral.py`, `models/mistral3.py` and `models/llava.py`.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.errors import ConfigError
from tightfit.model.blocks.linear import column_parallel, norm, replicated, row_parallel
from tightfit.model.config import Config
from tightfit.model.layout import Axis, Weight
from tightfit.model.towers.base import (
    Item,
    Media,
    Sizes,
    Tower,
    scoped,
    size_limit,
    whole_number,
)
from tightfit.model.towers.clip import feature_layers
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    convolution,
    vision_attention,
    vision_mlp,
)

_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
}
"""Of `PixtralVisionConfig`; without any `vision_config`, Mistral 3 differs in two."""
_MISTRAL = {"patch_size": 14, "image_size": 1540}


@dataclass(frozen=True, slots=True, kw_only=True)
class PixtralImages(Media):
    """One embedding per `merge` x `merge` patches; an image is scaled down to `image_size`."""

    image_size: int
    patch_size: int
    merge: int
    channels: int

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """A square of the longest edge, which `size` of the processor overrides.

        The square, or what is left of it within a limit of width or height.
        """
        edge = self._longest_edge(processor)
        unit = self.patch_size * self.merge
        sides = [size_limit(sizes, "image", side, edge) for side in ("width", "height")]
        shrink = max(1.0, max(sides) / edge)
        columns, rows = ((math.floor(side / shrink) - 1) // unit + 1 for side in sides)
        pixels = columns * rows * unit**2
        return (
            Item(
                modality="image",
                patches=columns * rows * self.merge**2,
                tokens=columns * rows,
                inputs=pixels * self.channels,
            ),
        )

    def _longest_edge(self, processor: Mapping[str, Any]) -> int:
        size = scoped(processor, "images_kwargs").get("size")
        return whole_number(
            size if isinstance(size, Mapping) else {}, "longest_edge", self.image_size
        )


def mistral3_tower(config: Config, text_hidden_size: int) -> Tower:
    """The tower of a `Mistral3ForConditionalGeneration`.

    Raises:
        ConfigError: its heads do not divide the hidden size, or a layer is asked for that is not
            there.
    """
    given = config.section("vision_config")
    vision = (given or Config(_MISTRAL, name=config.name)).with_defaults(_DEFAULTS)
    merge = config.integer("spatial_merge_size", default=2)
    projector = _projector(config, vision.integer("hidden_size"), text_hidden_size, merge)
    built = feature_layers(config, "vision_feature_layer", _count(vision), -1)
    return _tower(vision, built, merge, tuple(projector), text_hidden_size)


def pixtral_tower(config: Config, text_hidden_size: int, projector: tuple[Weight, ...]) -> Tower:
    """The encoder of a LLaVA with Pixtral: every patch becomes an embedding.

    Raises:
        ConfigError: as for Mistral 3.
    """
    section = config.section("vision_config") or Config({}, name=config.name)
    vision = section.with_defaults(_DEFAULTS)
    built = feature_layers(config, "vision_feature_layer", _count(vision), -2)
    return _tower(vision, built, 1, projector, text_hidden_size)


def pixtral_width(config: Config) -> int:
    """Features of the encoder of a LLaVA with Pixtral."""
    section = config.section("vision_config") or Config({}, name=config.name)
    return section.integer("hidden_size", default=_DEFAULTS["hidden_size"])


def _count(vision: Config) -> int:
    return vision.integer("num_hidden_layers", maximum=1000)


def _tower(
    vision: Config, built: int, merge: int, projector: tuple[Weight, ...], text_hidden_size: int
) -> Tower:
    hidden, heads = vision.integer("hidden_size"), vision.integer("num_attention_heads")
    if hidden % heads:
        raise ConfigError(
            f"{vision.name} has hidden_size = {hidden}, which is not a multiple of "
            f"num_attention_heads = {heads}",
            hint="correct the config.json",
        )
    count = _count(vision)
    layers = VisionLayers(
        prefix="vision_tower.transformer.layers",
        num_layers=count,
        hidden_size=hidden,
        attention=vision_attention(
            heads, hidden // heads, module="attention", qkv_bias=False, output_bias=False
        ),
        mlp=vision_mlp(
            vision.integer("intermediate_size"),
            vision.text("hidden_act", default="gelu"),
            module="feed_forward",
            gated=True,
            bias=False,
            up="up_proj",
            down="down_proj",
        ),
        norms=("attention_norm", "ffn_norm"),
        norm_bias=False,
    )
    patch, channels = vision.integer("patch_size"), vision.integer("num_channels")
    return Tower(
        modalities=("image",),
        weights=(
            *convolution(
                "vision_tower.patch_conv", rows=hidden, kernel=(channels, patch, patch), bias=False
            ),
            *norm("vision_tower.ln_pre", hidden, WHERE),
            *layers.weights(),
            *projector,
        ),
        media=PixtralImages(
            image_size=vision.integer("image_size"),
            patch_size=patch,
            merge=merge,
            channels=channels,
        ),
        hidden_size=hidden,
        intermediate_size=vision.integer("intermediate_size"),
        num_heads=heads,
        head_dim=hidden // heads,
        num_layers=built,
        output_size=text_hidden_size,
        gated=True,
        rotary=True,
        unbuilt=frozenset(w.name for i in range(built, count) for w in layers.layer(i)),
    )


def _projector(config: Config, hidden: int, text_hidden: int, merge: int) -> Iterator[Weight]:
    at, bias = "multi_modal_projector", config.boolean("multimodal_projector_bias")
    inner = Axis(label="the width of the projector", units=text_hidden)
    yield from norm(f"{at}.norm", hidden, WHERE)
    yield from replicated(
        f"{at}.patch_merger.merging_layer",
        rows=hidden,
        columns=hidden * merge**2,
        where=WHERE,
    )
    yield from column_parallel(f"{at}.linear_1", inner, columns=hidden, where=WHERE, bias=bias)
    yield from row_parallel(f"{at}.linear_2", inner, rows=text_hidden, where=WHERE, bias=bias)
