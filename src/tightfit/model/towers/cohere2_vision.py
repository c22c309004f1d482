"""Command A Vision: SigLIP on tiles, whose patches are shuffled into fewer embeddings.

Sources: vLLM's `models/cohere2_vision.py`, and transformers' image processor and defaults.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.errors import ConfigError
from tightfit.model.blocks.linear import linear, row_parallel, stack
from tightfit.model.config import Config
from tightfit.model.layout import Axis, Cut, Weight
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
    "image_size": 512,
    "num_hidden_layers": 27,
    "num_attention_heads": 12,
}
"""Of a `Cohere2VisionConfig` without a `vision_config`."""
_MOST_TILES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledCanvas(Media):
    """An image is put on the canvas of tiles that scales it the least; a tile more shows it all."""

    image_size: int
    patches: int
    tokens: int
    """Embeddings of a tile."""
    channels: int
    max_tiles: int = 12
    """Of the published model."""

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """vLLM profiles a column of tiles."""
        given = scoped(processor, "images_kwargs")
        most = min(whole_number(given, "max_patches", self.max_tiles), _MOST_TILES)
        tiles = 1
        if given.get("crop_to_patches", True) and most > 1:
            height = size_limit(sizes, "image", "height", most * self.image_size)
            width = size_limit(sizes, "image", "width", self.image_size)
            columns, rows = canvas(height, width, self.image_size, most)
            tiles = columns * rows + 1 if columns * rows > 1 else 1
        return (
            Item(
                modality="image",
                patches=tiles * self.patches,
                tokens=tiles * self.tokens,
                inputs=tiles * self.channels * self.image_size**2,
            ),
        )


def canvas(height: int, width: int, tile: int, most: int) -> tuple[int, int]:
    """Columns and rows of tiles (transformers' `get_optimal_tiled_canvas`)."""
    choice = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1) if w * h <= most]
    choice.sort(key=math.prod)
    scales = [min(w * tile / width, h * tile / height) for w, h in choice]
    if max(scales) < 1:
        return choice[scales.index(max(scales))]
    enough = [scale if scale >= 1 else math.inf for scale in scales]
    return choice[enough.index(min(enough))]


def cohere2_vision_tower(config: Config, text_hidden_size: int) -> Tower:
    """The tower of a `Cohere2VisionForConditionalGeneration`.

    Raises:
        ConfigError: the projector cannot be halved.
    """
    section = config.section("vision_config")
    vision = siglip(section or Config({}, name=config.name).with_defaults(_DEFAULTS))
    factor = config.integer("downsample_factor", default=2)
    width = config.integer("alignment_intermediate_size", default=36_864)
    if width % 2:
        raise ConfigError(
            f"{config.name} has alignment_intermediate_size = {width}, which is odd",
            hint="correct the config.json",
        )
    return Tower(
        modalities=("image",),
        weights=(
            *vision.weights("model.vision_tower.vision_model"),
            *_projector(vision, factor, width // 2, text_hidden_size),
        ),
        media=TiledCanvas(
            image_size=vision.image_size,
            patches=vision.patches,
            tokens=max(1, (vision.image_size // vision.patch_size // factor) ** 2),
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


def _projector(vision: Siglip, factor: int, inner: int, text_hidden_size: int) -> Iterator[Weight]:
    """One matrix holds both halves of the first layer, and each half is dealt."""
    at = "model.multi_modal_projector"
    axis = Axis(label="half of alignment_intermediate_size", units=inner)
    yield from linear(
        f"{at}.linear_1",
        stack(at, "linear_1", (("up", axis), ("gate", axis))),
        columns=vision.hidden_size * factor**2,
        cut=Cut.OUTPUT,
        where=WHERE,
        bias=True,
    )
    yield from row_parallel(f"{at}.linear_2", axis, rows=text_hidden_size, where=WHERE, bias=True)
