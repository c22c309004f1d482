"""InternViT and InternVL's tiles, in both forms of checkpoint.

Sources: vLLM's `intern_vit.py` and `internvl.py` for `InternVLChatModel`, `interns1_vit.py` and
`interns1.py` for the form of transformers.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Attention, Projections, QKNorm
from tightfit.model.blocks.linear import norm
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.base import Item, Media, Sizes, Tower, size_limit, whole_number
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    convolution,
    parameter,
    plain_linear,
    uncut,
    vision_attention,
    vision_mlp,
    whole_unless,
)

MOST_TILES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TileNames:
    """What a processor calls its settings."""

    smallest: str = "min_dynamic_patch"
    largest: str = "max_dynamic_patch"
    thumbnail: str = "use_thumbnail"


@dataclass(frozen=True, slots=True, kw_only=True)
class InternVLMedia(Media):
    """An image is cut into tiles, with a thumbnail if there are several; a frame is one tile."""

    image_size: int
    patches: int
    """Positions of a tile inside the encoder."""
    tokens: int
    """Embeddings of a tile."""
    channels: int
    has_video: bool
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    names: TileNames = TileNames()

    def largest(self, processor: Mapping[str, Any], max_tokens: int) -> tuple[Item, ...]:
        """A video fills what one image leaves of the context."""
        return self.profiled(processor, max_tokens, {}, ("image", "video"))

    def profiled(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """When a video is profiled, there is no image beside it, so it may be longer."""
        most = self._tiles(processor, None)
        limited = "height" in sizes.get("image", {}) or "width" in sizes.get("image", {})
        found = []
        if "image" in active:
            tiles = self._tiles(processor, sizes) if limited else most
            found.append(self._item("image", tiles))
        if "video" in active and self.has_video:
            room = max_tokens - (most * self.tokens if "image" in active else 0)
            counted = self._frames(room, sizes)
            shown = self._item("video", self._frames(max_tokens, sizes))
            found.append(replace(shown, tokens=counted * self.tokens, profiled_tokens=shown.tokens))
        return tuple(found)

    def _frames(self, room: int, sizes: Sizes) -> int:
        return size_limit(sizes, "video", "num_frames", max(1, room // self.tokens))

    def _item(self, modality: str, tiles: int) -> Item:
        return Item(
            modality=modality,
            patches=tiles * self.patches,
            tokens=tiles * self.tokens,
            inputs=tiles * self.channels * self.image_size**2,
        )

    def _tiles(self, processor: Mapping[str, Any], sizes: Sizes | None) -> int:
        """Tiles of the largest image, or of one that the user's limits make smaller."""
        least = min(whole_number(processor, self.names.smallest, self.min_tiles), MOST_TILES)
        most = min(whole_number(processor, self.names.largest, self.max_tiles), MOST_TILES)
        most = 1 if processor.get("dynamic_image_size") is False else max(most, least)
        thumbnail = bool(processor.get(self.names.thumbnail, self.thumbnail))
        best = most
        if sizes is not None:
            # vLLM profiles the first of the grids with the most tiles, in the order of its set.
            wider = grids(least, most + 1 if thumbnail and most > 1 else most)
            widest = next(grid for grid in wider if grid[0] * grid[1] == most)
            width = size_limit(sizes, "image", "width", widest[0] * self.image_size)
            height = size_limit(sizes, "image", "height", widest[1] * self.image_size)
            columns, rows = self._grid(grids(least, most), width, height)
            best = columns * rows
        return best + (1 if thumbnail and best > 1 else 0)

    def _grid(self, choice: list[tuple[int, int]], width: int, height: int) -> tuple[int, int]:
        """The grid of nearest aspect ratio; of several the largest that the pixels justify."""
        ratio, area = width / height, width * height
        best, nearest = (1, 1), float("inf")
        for columns, rows in choice:
            difference = abs(ratio - columns / rows)
            if difference < nearest:
                best, nearest = (columns, rows), difference
            elif difference == nearest and area > 0.5 * self.image_size**2 * columns * rows:
                best = (columns, rows)
        return best


def grids(least: int, most: int) -> list[tuple[int, int]]:
    """Columns and rows of every grid of `least` to `most` tiles, those with fewest tiles first.

    Among as many tiles the order is that of a set of pairs, which decides what vLLM profiles; it
    depends on how the set was made (`get_internvl_target_ratios`).
    """
    found = {
        (columns, rows)
        for count in range(least, most + 1)
        for columns in range(1, count + 1)
        for rows in range(-(-least // columns), min(count, most // columns) + 1)
    }
    return sorted(found, key=lambda grid: grid[0] * grid[1])


def side(config: Config, key: str, default: int) -> int:
    """A side of a square, which configs give as one number or as two alike.

    Raises:
        UnsupportedModelError: the numbers differ.
    """
    given = config.raw(key)
    if not isinstance(given, list):
        return config.integer(key, default=default)
    both = config.integers(key)
    if len(set(both)) != 1 or both[0] < 1:
        raise UnsupportedModelError(f"{config.name} has {key} = {list(both)}, which is no square")
    return both[0]


def internvl_chat_tower(config: Config, text_hidden_size: int, *, has_video: bool) -> Tower:
    """The tower of an `InternVLChatModel`, whose checkpoint calls it `vision_model` and `mlp1`."""
    vision = config.section("vision_config") or Config({}, name=config.name)
    hidden, heads = _hidden(vision)
    full = QKNorm.FULL if vision.boolean("qk_normalization", default=True) else QKNorm.NONE
    attention = vision_attention(
        heads,
        hidden // heads,
        module="attn",
        names=Projections(fused="qkv", output="proj"),
        qkv_bias=vision.boolean("qkv_bias"),
        qk_norm=full,
    )
    layers = VisionLayers(
        prefix="vision_model.encoder.layers",
        num_layers=vision.integer("num_hidden_layers", default=48, maximum=1000),
        hidden_size=hidden,
        attention=attention,
        mlp=_mlp(vision),
        norms=("norm1", "norm2"),
        norm_bias=vision.text("norm_type", default="rms_norm") == "layer_norm",
        vectors=("ls1", "ls2"),
    )
    image, patch = side(vision, "image_size", 224), side(vision, "patch_size", 14)
    select = config.integer("select_layer", default=-1, minimum=-layers.num_layers)
    used = layers.num_layers + select + 1 if select < 0 else select + 1
    at, positions = "vision_model.embeddings", (image // patch) ** 2 + 1
    merged = hidden * _shuffle(config)
    weights = (
        parameter(f"{at}.class_embedding", 1, 1, hidden),
        *convolution(f"{at}.patch_embedding", rows=hidden, kernel=(3, patch, patch), bias=True),
        parameter(f"{at}.position_embedding", 1, positions, hidden),
        *(_attention_falls_back(weight, heads) for weight in layers.weights()),
        *norm("mlp1.0", merged, WHERE, bias=True),
        *plain_linear("mlp1.1", rows=text_hidden_size, columns=merged),
        *plain_linear("mlp1.3", rows=text_hidden_size, columns=text_hidden_size),
    )
    late = (w.name for i in range(used, layers.num_layers) for w in layers.layer(i))
    media = InternVLMedia(
        image_size=image,
        patches=positions,
        tokens=_tokens(image, patch, config),
        channels=3,
        has_video=has_video,
        min_tiles=config.integer("min_dynamic_patch", default=1),
        max_tiles=config.integer("max_dynamic_patch", default=6)
        if config.boolean("dynamic_image_size")
        else 1,
        thumbnail=config.boolean("use_thumbnail"),
    )
    tower = _tower(layers, weights, media, text_hidden_size)
    return replace(tower, num_layers=used, unbuilt=frozenset(late), data_parallel=True)


def internvl_tower(config: Config, text_hidden_size: int) -> Tower:
    """The tower of an `InternVLForConditionalGeneration`; vLLM does not cut its attention."""
    vision = config.section("vision_config") or Config({}, name=config.name)
    hidden, heads = _hidden(vision)
    attention = vision_attention(
        heads,
        hidden // heads,
        module="attention",
        names=Projections(output="projection_layer"),
        qkv_bias=vision.boolean("attention_bias"),
        qk_norm=QKNorm.FULL if vision.boolean("use_qk_norm") else QKNorm.NONE,
    )
    layers = VisionLayers(
        prefix="vision_tower.encoder.layer",
        num_layers=vision.integer("num_hidden_layers", default=24, maximum=1000),
        hidden_size=hidden,
        attention=attention,
        mlp=_mlp(vision),
        norms=("layernorm_before", "layernorm_after"),
        norm_bias=vision.text("norm_type", default="layer_norm") == "layer_norm",
        vectors=("lambda_1", "lambda_2"),
    )
    image, patch = side(vision, "image_size", 448), side(vision, "patch_size", 14)
    at, projector = "vision_tower.embeddings", "multi_modal_projector"
    positions, merged = (image // patch) ** 2 + 1, hidden * _shuffle(config)
    tail = () if vision.boolean("use_mean_pooling", default=True) else ("vision_tower.layernorm",)
    weights = (
        parameter(f"{at}.cls_token", 1, 1, hidden),
        *_optional(vision, "use_mask_token", False, parameter(f"{at}.mask_token", 1, 1, hidden)),
        *convolution(
            f"{at}.patch_embeddings.projection", rows=hidden, kernel=(3, patch, patch), bias=True
        ),
        *_optional(
            vision,
            "use_absolute_position_embeddings",
            True,
            parameter(f"{at}.position_embeddings", 1, positions, hidden),
        ),
        *(uncut(w) if ".attention." in w.name else w for w in layers.weights()),
        *(weight for name in tail for weight in norm(name, hidden, WHERE, bias=True)),
        *norm(f"{projector}.layer_norm", merged, WHERE, bias=True),
        *plain_linear(f"{projector}.linear_1", rows=text_hidden_size, columns=merged),
        *plain_linear(f"{projector}.linear_2", rows=text_hidden_size, columns=text_hidden_size),
    )
    media = InternVLMedia(
        image_size=image,
        patches=positions,
        tokens=_tokens(image, patch, config),
        channels=3,
        has_video=True,
        min_tiles=1,
        max_tiles=12,
        thumbnail=True,
        names=TileNames(smallest="min_patches", largest="max_patches", thumbnail="crop_to_patches"),
    )
    return _tower(layers, weights, media, text_hidden_size)


def _attention_falls_back(weight: Weight, heads: int) -> Weight:
    """vLLM leaves the attention of InternViT-6B whole, whose 25 heads rarely divide."""
    return whole_unless(weight, heads) if ".attn." in weight.name else weight


def _optional(config: Config, key: str, default: bool, weight: Weight) -> Iterator[Weight]:
    if config.boolean(key, default=default):
        yield weight


def _hidden(vision: Config) -> tuple[int, int]:
    """Features and heads; the defaults of both forms of config are given in all checkpoints."""
    hidden = vision.integer("hidden_size", default=1024)
    heads = vision.integer("num_attention_heads", default=16)
    if hidden % heads:
        raise ConfigError(
            f"{vision.name} has hidden_size = {hidden}, which is not a multiple of "
            f"num_attention_heads = {heads}",
            hint="correct the config.json",
        )
    return hidden, heads


def _mlp(vision: Config) -> Any:
    return vision_mlp(
        vision.integer("intermediate_size", default=4096),
        vision.text("hidden_act", default="gelu"),
    )


def _shuffle(config: Config) -> int:
    """How many patches become one embedding."""
    ratio = config.positive("downsample_ratio", default=0.5)
    if ratio > 1:
        raise ConfigError(
            f"{config.name} has downsample_ratio = {ratio}, which is more than 1",
            hint="correct the config.json",
        )
    return int(1 / ratio) ** 2


def _tokens(image: int, patch: int, config: Config) -> int:
    tokens = int((image // patch) ** 2 * config.positive("downsample_ratio", default=0.5) ** 2)
    if tokens < 1:
        raise ConfigError(
            f"{config.name} makes no embeddings of an image of {image} pixels",
            hint="correct image_size, patch_size or downsample_ratio in the config.json",
        )
    return tokens


def _tower(
    layers: VisionLayers, weights: tuple[Weight, ...], media: InternVLMedia, out: int
) -> Tower:
    attention: Attention = layers.attention
    return Tower(
        modalities=("image", "video"),
        weights=weights,
        media=media,
        hidden_size=layers.hidden_size,
        intermediate_size=layers.mlp.intermediate_size,
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        num_layers=layers.num_layers,
        output_size=out,
        held=layers.hidden_size,
    )
