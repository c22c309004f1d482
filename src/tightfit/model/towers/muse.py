"""Muse Glimmer's encoder of images and videos (vLLM's `models/muse_glimmer.py`)."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from tightfit.errors import ConfigError
from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.linear import norm, replicated
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.base import Item, Media, Sizes, Tower, size_limit
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    parameter,
    uncut,
    vision_attention,
    vision_mlp,
)

MOST_IMAGE_TOKENS = 4096
MOST_FRAME_TOKENS = 144
MOST_FRAMES = 96
"""Of vLLM's own processor, which no option reaches."""

_DEFAULTS = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 50,
    "num_attention_heads": 16,
    "patch_size": 14,
    "patch_temporal": 2,
    "merge_size": 2,
    "pos_emb_height": 32,
    "pos_emb_width": 32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MuseMedia(Media):
    """Images and groups of frames keep their aspect ratio below a number of tokens."""

    patch_size: int
    merge: int
    temporal: int
    """Frames of a group, which is encoded like an image."""

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """Squares; a video has as many groups of frames as the context holds.

        Those within a limit of width, height or frames; the budget counts the largest.
        """
        most = max(1, min(max_tokens // MOST_FRAME_TOKENS, MOST_FRAMES // self.temporal))
        frames = size_limit(sizes, "video", "num_frames", most * self.temporal)
        kinds = (
            ("image", MOST_IMAGE_TOKENS, 1, 1, 1),
            ("video", MOST_FRAME_TOKENS, most, max(1, frames // self.temporal), self.temporal),
        )
        return tuple(
            self._item(modality, each, counted, groups, depth, sizes)
            for modality, each, counted, groups, depth in kinds
        )

    def _item(
        self,
        modality: str,
        each: int,
        counted: int,
        groups: int,
        depth: int,
        sizes: Sizes,
    ) -> Item:
        unit = self.patch_size * self.merge
        side = math.isqrt(each) * unit
        width = size_limit(sizes, modality, "width", side)
        height = size_limit(sizes, modality, "height", side)
        tokens = groups * grid_tokens(width, height, unit, each)
        return Item(
            modality=modality,
            patches=tokens * self.merge**2,
            tokens=counted * each,
            inputs=3 * depth * tokens * unit**2,
            profiled_tokens=tokens,
        )


def grid_tokens(width: int, height: int, unit: int, most: int) -> int:
    """Squares of `unit` pixels in the grid nearest to the aspect ratio (`_grid_size` in vLLM)."""
    rows, columns = height / unit, width / unit
    if rows * columns > most:
        ratio = columns / rows
        rows = math.sqrt(most / ratio)
        columns = rows * ratio
    grids = [
        (r, c)
        for r, c in product(
            (math.floor(rows), math.ceil(rows)), (math.floor(columns), math.ceil(columns))
        )
        if r >= 1 and c >= 1 and r * c <= most
    ]
    grids = grids or [(max(1, round(rows)), max(1, round(columns)))]
    r, c = min(grids, key=lambda grid: abs(grid[0] / grid[1] - height / width))
    return r * c


def muse_tower(config: Config, text_hidden_size: int) -> Tower:
    """The tower of a `MuseGlimmerForConditionalGeneration`.

    Raises:
        ConfigError: its heads do not divide the hidden size.
    """
    given = config.section("vision_config") or Config({}, name=config.name)
    vision = given.with_defaults(_DEFAULTS)
    hidden, heads = vision.integer("hidden_size"), vision.integer("num_attention_heads")
    if hidden % heads:
        raise ConfigError(
            f"{vision.name} has hidden_size = {hidden}, which is not a multiple of "
            f"num_attention_heads = {heads}",
            hint="correct the config.json",
        )
    width, count = (
        vision.integer("intermediate_size"),
        vision.integer("num_hidden_layers", maximum=1000),
    )
    layers = VisionLayers(
        prefix="model.vision_tower.layers",
        num_layers=count,
        hidden_size=hidden,
        attention=vision_attention(
            heads, hidden // heads, module="attn", names=Projections(output="proj")
        ),
        mlp=vision_mlp(width, vision.text("hidden_act", default="gelu")),
        norms=("norm1", "norm2"),
        whole_unless_heads_divide=True,
    )
    return Tower(
        modalities=("image", "video"),
        weights=tuple(_weights(config, vision, layers, text_hidden_size)),
        media=MuseMedia(
            patch_size=vision.integer("patch_size"),
            merge=vision.integer("merge_size"),
            temporal=vision.integer("patch_temporal"),
        ),
        hidden_size=hidden,
        intermediate_size=width,
        num_heads=heads,
        head_dim=hidden // heads,
        num_layers=count,
        output_size=text_hidden_size,
        rotary=True,
    )


def _weights(
    config: Config, vision: Config, layers: VisionLayers, text_hidden_size: int
) -> Iterator[Weight]:
    """Only attention is cut; MLPs and projector are plain linear layers in vLLM."""
    at, hidden = "model.vision_tower", layers.hidden_size
    patch = 3 * vision.integer("patch_temporal") * vision.integer("patch_size") ** 2
    positions = vision.integer("pos_emb_height") * vision.integer("pos_emb_width")
    yield from replicated(
        f"{at}.patch_embedder.patch_embedding", rows=hidden, columns=patch, where=WHERE
    )
    yield parameter(f"{at}.patch_embedder.position_embedding_table.weight", positions, hidden)
    for name in ("ln_pre", "ln_post"):
        yield from norm(f"{at}.{name}", hidden, WHERE, bias=True)
    for weight in layers.weights():
        yield uncut(weight) if ".mlp." in weight.name else weight
    merged = hidden * vision.integer("merge_size") ** 2
    inner = config.integer("projector_hidden_size", default=4096)
    for name, rows, columns in (
        ("model.vision_adapter.fc1", inner, merged),
        ("model.vision_adapter.fc2", inner, inner),
        ("model.vision_projection", text_hidden_size, inner),
    ):
        yield from replicated(name, rows=rows, columns=columns, where=WHERE)
