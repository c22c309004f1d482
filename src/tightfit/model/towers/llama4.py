"""Llama 4's images: tiles, a vision transformer, and pixel shuffle (vLLM's `models/mllama4.py`)."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.errors import ConfigError
from tightfit.model.blocks.linear import column_parallel, norm, row_parallel
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
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    parameter,
    vision_attention,
    vision_mlp,
)

_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 5632,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "vision_output_dim": 7680,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
}
"""Of `Llama4VisionConfig`, which is not what the published models have."""
DEFAULT_MAX_TILES = 16
"""`max_patches` of transformers' `Llama4ImageProcessor`."""
MOST_TILES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama4Images(Media):
    """Tiles that fit an image best, and the whole image once more if there are several."""

    image_size: int
    patches: int
    """Of a tile, the class token included."""
    tokens: int
    """Of a tile, after pixel shuffle."""
    channels: int

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """As many tiles as `max_patches` allows, one above the other.

        That image within a limit of width or height.
        """
        given, tile = scoped(processor, "images_kwargs"), self.image_size
        most = min(MOST_TILES, whole_number(given, "max_patches", DEFAULT_MAX_TILES))
        width = size_limit(sizes, "image", "width", tile)
        height = size_limit(sizes, "image", "height", tile * most)
        tiles = best_tiles(
            width, height, tile, most, largest=bool(given.get("resize_to_max_canvas"))
        )
        tiles += tiles > 1
        return (
            Item(
                modality="image",
                patches=tiles * self.patches,
                tokens=tiles * self.tokens,
                inputs=tiles * self.channels * tile**2,
            ),
        )


def best_tiles(width: int, height: int, tile: int, most: int, *, largest: bool) -> int:
    """Tiles of the canvas that transformers' `get_best_fit` chooses for an image.

    It is the canvas that enlarges the image least (or most, if `largest`), or else shrinks it
    least, and the smallest of those.
    """
    found: dict[float, int] = {}
    for rows in range(1, most + 1):
        for columns in range(1, most // rows + 1):
            scale = min(columns * tile / width, rows * tile / height)
            found[scale] = min(found.get(scale, most), rows * columns)
    enlarging = [scale for scale in found if scale >= 1]
    if not enlarging:
        return found[max(found)]
    return found[max(enlarging) if largest else min(enlarging)]


def llama4_tower(config: Config, text_hidden_size: int) -> Tower:
    """The tower of a `Llama4ForConditionalGeneration`.

    Raises:
        ConfigError: its heads do not divide the hidden size, or its patches the image.
    """
    given = config.section("vision_config") or Config({}, name=config.name)
    vision = given.with_defaults(_DEFAULTS)
    hidden, heads = vision.integer("hidden_size"), vision.integer("num_attention_heads")
    image, patch = vision.integer("image_size"), vision.integer("patch_size")
    for whole, part in ((hidden, heads), (image, patch)):
        if whole % part:
            raise ConfigError(
                f"{vision.name} has a size of {whole}, which is not a multiple of {part}",
                hint="correct hidden_size or image_size in the config.json",
            )
    patches = (image // patch) ** 2
    width = vision.integer("intermediate_size")
    ratio = min(1.0, vision.positive("pixel_shuffle_ratio", default=0.5))
    return Tower(
        modalities=("image",),
        weights=tuple(_weights(vision, patches, text_hidden_size)),
        media=Llama4Images(
            image_size=image,
            patches=patches + 1,
            tokens=max(1, int(patches * ratio**2)),
            channels=vision.integer("num_channels"),
        ),
        hidden_size=hidden,
        intermediate_size=width,
        num_heads=heads,
        head_dim=hidden // heads,
        num_layers=vision.integer("num_hidden_layers", maximum=1000),
        output_size=text_hidden_size,
        rotary=True,
    )


def _weights(vision: Config, patches: int, text_hidden_size: int) -> Iterator[Weight]:
    at, hidden = "vision_model", vision.integer("hidden_size")
    heads, width = vision.integer("num_attention_heads"), vision.integer("intermediate_size")
    yield parameter(f"{at}.class_embedding", hidden)
    yield parameter(f"{at}.positional_embedding_vlm", patches + 1, hidden)
    yield from column_parallel(
        f"{at}.patch_embedding.linear",
        Axis(label="hidden_size of the vision encoder", units=hidden),
        columns=vision.integer("num_channels") * vision.integer("patch_size") ** 2,
        where=WHERE,
    )
    yield from norm(f"{at}.layernorm_pre", hidden, WHERE, bias=True)
    yield from norm(f"{at}.layernorm_post", hidden, WHERE, bias=True)
    yield from VisionLayers(
        prefix=f"{at}.model.layers",
        num_layers=vision.integer("num_hidden_layers", maximum=1000),
        hidden_size=hidden,
        attention=vision_attention(heads, hidden // heads),
        mlp=vision_mlp(width, "gelu"),
        norms=("input_layernorm", "post_attention_layernorm"),
    ).weights()
    yield from _adapter(vision, f"{at}.vision_adapter.mlp", width)
    yield from column_parallel(
        "multi_modal_projector.linear_1",
        Axis(label="hidden_size", units=text_hidden_size),
        columns=vision.integer("vision_output_dim"),
        where=WHERE,
    )


def _adapter(vision: Config, prefix: str, width: int) -> Iterator[Weight]:
    """An MLP whose input has `intermediate_size` features, as the shuffled pixels do."""
    inner = Axis(label="projector_input_dim", units=vision.integer("projector_input_dim"))
    outputs, bias = (
        vision.integer("projector_output_dim"),
        vision.boolean("multi_modal_projector_bias"),
    )
    yield from column_parallel(f"{prefix}.fc1", inner, columns=width, where=WHERE, bias=bias)
    yield from row_parallel(f"{prefix}.fc2", inner, rows=outputs, where=WHERE, bias=bias)
