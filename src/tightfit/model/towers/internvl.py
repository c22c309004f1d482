"""InternViT and its projector, in both forms of checkpoint.

Sources: vLLM's `intern_vit.py` and `internvl.py` for `InternVLChatModel`, `interns1_vit.py` and
`interns1.py` for the form of transformers.
"""

from collections.abc import Iterator
from dataclasses import replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Attention, Projections, QKNorm
from tightfit.model.blocks.linear import norm
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.base import Tower
from tightfit.model.towers.internvl_media import InternVLMedia, TileNames
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    apart,
    convolution,
    parameter,
    plain_linear,
    vision_attention,
    vision_mlp,
    whole_unless,
)


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
        *(a for w in layers.weights() for a in (apart(w) if ".attention." in w.name else (w,))),
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


def _mlp(vision: Config) -> DenseMLP:
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
