"""Gemma 3's images: SigLIP, pooled to `mm_tokens_per_image` embeddings per crop."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.model.blocks.linear import norm
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
from tightfit.model.towers.vit import WHERE, parameter

DEFAULT_MAX_CROPS = 4
DEFAULT_MIN_CROP_SIZE = 256
DEFAULT_MIN_RATIO = 1.2
"""Of transformers' `Gemma3ImageProcessor`, as vLLM's `gemma3_mm.py: get_num_crops` reads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3Images(Media):
    """`(crops + 1) * tokens_per_crop` embeddings; there are crops only with `do_pan_and_scan`."""

    image_size: int
    patches: int
    tokens: int
    channels: int

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """An image as tall as the most crops, and one crop wide, as vLLM's dummy is.

        That image within a limit of width or height.
        """
        given = scoped(processor, "images_kwargs")
        most = whole_number(given, "pan_and_scan_max_num_crops", DEFAULT_MAX_CROPS)
        width = size_limit(sizes, "image", "width", self.image_size)
        height = size_limit(sizes, "image", "height", self.image_size * most)
        crops = 1 + self._crops(given, width, height, most)
        return (
            Item(
                modality="image",
                patches=crops * self.patches,
                tokens=crops * self.tokens,
                inputs=crops * self.channels * self.image_size**2,
            ),
        )

    @staticmethod
    def _crops(given: Mapping[str, Any], width: int, height: int, most: int) -> int:
        if not given.get("do_pan_and_scan"):
            return 0
        long, short = max(width, height), min(width, height)
        least = whole_number(given, "pan_and_scan_min_crop_size", DEFAULT_MIN_CROP_SIZE)
        ratio = given.get("pan_and_scan_min_ratio_to_activate")
        if long / short < (ratio if isinstance(ratio, int | float) else DEFAULT_MIN_RATIO):
            return 0
        crops = min(most, max(2, min(long // least, math.floor(long / short + 0.5))))
        return 0 if min(math.ceil(long / crops), short) < least else crops


def gemma3_tower(config: Config, text_hidden_size: int) -> Tower:
    """The tower of a `Gemma3ForConditionalGeneration`."""
    vision = siglip(config.section("vision_config") or Config({}, name=config.name))
    tokens = config.integer("mm_tokens_per_image", default=256)
    return Tower(
        modalities=("image",),
        weights=tuple(_weights(vision, text_hidden_size)),
        media=Gemma3Images(
            image_size=vision.image_size,
            patches=vision.patches,
            tokens=tokens,
            channels=vision.channels,
        ),
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads,
        head_dim=vision.head_dim,
        num_layers=vision.num_layers,
        output_size=text_hidden_size,
    )


def _weights(vision: Siglip, text_hidden_size: int) -> Iterator[Weight]:
    yield from vision.weights("vision_tower.vision_model")
    at, size = "multi_modal_projector", vision.hidden_size
    yield parameter(f"{at}.mm_input_projection_weight", size, text_hidden_size)
    yield from norm(f"{at}.mm_soft_emb_norm", size, WHERE)
