"""Llama 3.2 Vision's encoder of tiles: `models/mllama.py` of vLLM up to 0.10.2."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from tightfit.errors import ConfigError
from tightfit.model.blocks.linear import column_parallel, norm, vector
from tightfit.model.config import Config
from tightfit.model.layout import Axis, Cut, Part, Weight
from tightfit.model.towers.base import Item, Media, Sizes, Tower
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    parameter,
    vision_attention,
    vision_mlp,
)
from tightfit.units import round_up

_DEFAULTS = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "max_num_tiles": 4,
    "vision_output_dim": 7680,
}
PATCH_PADDING = 8
"""The positions of a tile are padded to a multiple of this."""
ASPECT_RATIOS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledImages(Media):
    """Every image is padded to the most tiles; its features go to cross attention."""

    tiles: int
    positions: int
    """Of a tile, the class token included."""
    pixels: int
    """Elements of a tile."""

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """All tiles of an image."""
        return (
            Item(
                modality="image",
                patches=self.tiles * round_up(self.positions, PATCH_PADDING),
                tokens=self.tiles * self.positions,
                inputs=self.tiles * self.pixels,
            ),
        )


def mllama_tower(config: Config, text_hidden_size: int) -> Tower:
    """The tower of a `MllamaForConditionalGeneration`.

    Raises:
        ConfigError: its heads do not divide the hidden size.
    """
    given = config.section("vision_config") or Config({}, name=config.name)
    vision = given.with_defaults(_DEFAULTS)
    hidden, heads = vision.integer("hidden_size"), vision.integer("attention_heads")
    if hidden % heads:
        raise ConfigError(
            f"{vision.name} has hidden_size = {hidden}, which is not a multiple of "
            f"attention_heads = {heads}",
            hint="correct the config.json",
        )
    image, patch = vision.integer("image_size"), vision.integer("patch_size")
    positions = (image // patch) ** 2 + 1
    tiles = vision.integer("max_num_tiles", maximum=1000)
    return Tower(
        modalities=("image",),
        weights=tuple(_weights(vision, positions, text_hidden_size)),
        media=TiledImages(
            tiles=tiles,
            positions=positions,
            pixels=vision.integer("num_channels") * image**2,
        ),
        hidden_size=hidden,
        intermediate_size=vision.integer("intermediate_size"),
        num_heads=heads,
        head_dim=hidden // heads,
        num_layers=vision.integer("num_hidden_layers", maximum=1000)
        + vision.integer("num_global_layers", maximum=1000),
        output_size=text_hidden_size,
    )


def _weights(vision: Config, positions: int, text_hidden_size: int) -> Iterator[Weight]:
    at, hidden = "vision_model", vision.integer("hidden_size")
    tiles, patch = vision.integer("max_num_tiles"), vision.integer("patch_size")
    kernel = (vision.integer("num_channels"), patch, patch)
    patches = f"{at}.patch_embedding.weight"
    axis = Axis(label="hidden_size of the vision encoder", units=hidden)
    yield Weight(
        name=patches,
        parts=(Part(source=patches, rows=hidden, axis=axis),),
        columns=prod(kernel),
        cut=Cut.OUTPUT,
        where=WHERE,
        stored_shape=(hidden, *kernel),
    )
    yield parameter(f"{at}.class_embedding", hidden)
    ratios = vision.raw("supported_aspect_ratios")
    rows = 1 + (len(ratios) if isinstance(ratios, list) else ASPECT_RATIOS)
    gated = f"{at}.gated_positional_embedding"
    yield vector(f"{gated}.gate", 1, WHERE)
    yield parameter(f"{gated}.embedding", positions, hidden)
    yield parameter(f"{gated}.tile_embedding.weight", rows, tiles * positions * hidden)
    for name in ("pre", "post"):
        yield vector(f"{at}.{name}_tile_positional_embedding.gate", 1, WHERE)
        table = f"{at}.{name}_tile_positional_embedding.embedding.weight"
        yield parameter(table, rows, tiles * hidden)
        yield from norm(f"{at}.layernorm_{name}", hidden, WHERE, bias=True)
    yield from _layers(vision, f"{at}.transformer.layers", "num_hidden_layers").weights()
    layers = _layers(vision, f"{at}.global_transformer.layers", "num_global_layers")
    yield from layers.weights()
    for i in range(layers.num_layers):
        for name in ("gate_attn", "gate_ffn"):
            yield vector(f"{layers.prefix}.{i}.{name}", 1, WHERE)
    yield from column_parallel(
        "multi_modal_projector",
        Axis(label="hidden_size", units=text_hidden_size),
        columns=vision.integer("vision_output_dim"),
        where=WHERE,
        bias=True,
    )


def _layers(vision: Config, prefix: str, count: str) -> VisionLayers:
    hidden, heads = vision.integer("hidden_size"), vision.integer("attention_heads")
    width, activation = (
        vision.integer("intermediate_size"),
        vision.text("hidden_act", default="gelu"),
    )
    return VisionLayers(
        prefix=prefix,
        num_layers=vision.integer(count, maximum=1000),
        hidden_size=hidden,
        attention=vision_attention(heads, hidden // heads, qkv_bias=False, output_bias=False),
        mlp=vision_mlp(width, activation),
        norms=("input_layernorm", "post_attention_layernorm"),
    )
