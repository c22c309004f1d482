"""Idefics 3 and SmolVLM: SigLIP on tiles, whose patches are shuffled into fewer embeddings.

Sources: vLLM's `idefics3.py` and `idefics2_vision_model.py`, and transformers' image processor.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.model.blocks.linear import replicated
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.base import (
    Item,
    Media,
    Sizes,
    Tower,
    scoped,
    size_limit,
    whole_number,
)
from tightfit.model.towers.siglip import Siglip, siglip
from tightfit.model.towers.vit import WHERE

_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
}
"""Of `Idefics3VisionConfig` and `SmolVLMVisionConfig`."""
_MOST_PIXELS = 4096
"""Of the side of a scaled image (`MAX_IMAGE_SIZE`)."""
_TILES = 4
"""Along the side of the largest image of all published models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledImages(Media):
    """An image is scaled so that its longer side has so many pixels, and cut into tiles.

    A tile more shows all of it. The processor's `size` and `max_image_size` are of the image and of
    a tile; published models have tiles of the encoder's size, and four along the longer side.
    """

    image_size: int
    patches: int
    tokens: int
    """Embeddings of a tile."""
    channels: int

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """A square, or what the user's limits leave of one: all are scaled up."""
        given = scoped(processor, "images_kwargs")
        tile = _longest_edge(given, "max_image_size", self.image_size)
        longest = _longest_edge(given, "size", _TILES * self.image_size)
        tiles = 1
        if given.get("do_image_splitting", True):
            height = size_limit(sizes, "image", "height", tile)
            width = size_limit(sizes, "image", "width", tile)
            rows, columns = (math.ceil(n / tile) for n in scaled(height, width, longest))
            tiles = rows * columns + 1 if rows * columns > 1 else 1
        return (
            Item(
                modality="image",
                patches=tiles * self.patches,
                tokens=tiles * self.tokens,
                inputs=tiles * self.channels * tile**2,
            ),
        )


def scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """Sides of an image whose longer one has so many pixels; the other is even.

    (`_resize_output_size_rescale_to_max_len` and `_resize_output_size_scale_below_upper_bound`.)
    """
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        height, width = longest, int(longest * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > _MOST_PIXELS:
        width, height = _MOST_PIXELS, int(_MOST_PIXELS / ratio)
    elif height > width and height > _MOST_PIXELS:
        height, width = _MOST_PIXELS, int(_MOST_PIXELS * ratio)
    return max(height, 1), max(width, 1)


def _longest_edge(given: Mapping[str, Any], key: str, default: int) -> int:
    size = given.get(key)
    return whole_number(size if isinstance(size, Mapping) else {}, "longest_edge", default)


def idefics3_tower(config: Config, text_hidden_size: int) -> Tower:
    """The tower of an `Idefics3ForConditionalGeneration` or a SmolVLM."""
    section = config.section("vision_config") or Config({}, name=config.name)
    vision = siglip(
        section.without("vision_use_head").with_defaults({**_DEFAULTS, "vision_use_head": False})
    )
    factor = config.integer("scale_factor", default=2)
    return Tower(
        modalities=("image",),
        weights=tuple(_weights(vision, factor, text_hidden_size)),
        media=TiledImages(
            image_size=vision.image_size,
            patches=vision.patches,
            tokens=max(1, vision.patches // factor**2),
            channels=vision.channels,
        ),
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads,
        head_dim=vision.head_dim,
        num_layers=vision.num_layers,
        output_size=text_hidden_size,
        held=vision.hidden_size,
    )


def _weights(vision: Siglip, factor: int, text_hidden_size: int) -> Iterator[Weight]:
    yield from vision.weights("model.vision_model")
    yield from replicated(
        "model.connector.modality_projection.proj",
        rows=text_hidden_size,
        columns=vision.hidden_size * factor**2,
        where=WHERE,
    )
