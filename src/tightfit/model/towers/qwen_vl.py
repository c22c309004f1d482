"""The vision transformers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5.

Patches of two frames, rotary positions, and a merger that makes one embedding of four patches.
Sources: vLLM's `qwen2_vl.py`, `qwen2_5_vl.py`, `qwen3_vl.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tightfit.errors import ConfigError
from tightfit.model.blocks.attention import Attention, Projections
from tightfit.model.blocks.linear import column_parallel, norm, row_parallel
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.layout import Axis, Weight
from tightfit.model.towers.base import Media, Tower
from tightfit.model.towers.qwen_media import Qwen2Media, Qwen3Media, QwenGrid
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    convolution,
    parameter,
    vision_attention,
    vision_mlp,
)

_QWEN2 = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "hidden_act": "quick_gelu",
}
_QWEN2_5 = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "hidden_act": "silu",
}
_QWEN3 = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "out_hidden_size": 3584,
    "num_heads": 16,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 2304,
    "hidden_act": "gelu_pytorch_tanh",
}
"""Of transformers' config classes."""


def qwen2_tower(config: Config, prefix: str = "visual") -> Tower:
    """Qwen2-VL: LayerNorms, an MLP without a gate, no position parameters."""
    vision = _section(config, _QWEN2)
    hidden = vision.integer("embed_dim")
    inner = int(hidden * vision.positive("mlp_ratio"))
    mlp = vision_mlp(inner, vision.text("hidden_act"))
    layers = _layers(vision, prefix, hidden, mlp, norm_bias=True)
    as_it_is = replace(layers.attention, names=replace(layers.attention.names, by_head=True))
    layers = replace(layers, attention=as_it_is)
    out = vision.integer("hidden_size")
    merger = (*_norm_merger(f"{prefix}.merger", hidden, vision, out, norm_bias=True),)
    media = Qwen2Media(grid=grid(vision))
    weights = (*_patches(vision, prefix, hidden, bias=False), *layers.weights(), *merger)
    return _tower(layers, weights, media, out)


def qwen2_5_tower(config: Config, prefix: str = "visual") -> Tower:
    """Qwen2.5-VL: RMSNorms, gated MLPs, attention in windows in most layers."""
    vision = _section(config, _QWEN2_5)
    hidden = vision.integer("hidden_size")
    mlp = DenseMLP(
        intermediate_size=vision.integer("intermediate_size"),
        activation=vision.text("hidden_act"),
        bias=True,
    )
    layers = _layers(vision, prefix, hidden, mlp, norm_bias=False)
    out = vision.integer("out_hidden_size")
    merger = (*_norm_merger(f"{prefix}.merger", hidden, vision, out, norm_bias=False),)
    media = Qwen2Media(grid=grid(vision))
    weights = (*_patches(vision, prefix, hidden, bias=False), *layers.weights(), *merger)
    return _tower(layers, weights, media, out)


def qwen3_tower(
    config: Config, default_deepstack: tuple[int, ...], prefix: str = "model.visual"
) -> Tower:
    """Qwen3-VL: learned positions, and mergers after some layers, whose features go on as well.

    `default_deepstack` are those layers where the config names none; Qwen3.5 has none.
    """
    vision = _section(config, _QWEN3)
    hidden = vision.integer("hidden_size")
    mlp = vision_mlp(
        vision.integer("intermediate_size"),
        vision.text("hidden_act"),
        up="linear_fc1",
        down="linear_fc2",
    )
    layers = _layers(vision, prefix, hidden, mlp, norm_bias=True)
    out = vision.integer("out_hidden_size")
    given = vision.has("deepstack_visual_indexes")
    deep = vision.integers("deepstack_visual_indexes") if given else default_deepstack
    weights = (
        *_patches(vision, prefix, hidden, bias=True),
        parameter(f"{prefix}.pos_embed.weight", vision.integer("num_position_embeddings"), hidden),
        *layers.weights(),
        *_merger(f"{prefix}.merger", hidden, vision, out, norm_size=hidden),
        *(
            weight
            for i in range(len(deep))
            for weight in _merger(
                f"{prefix}.deepstack_merger_list.{i}", hidden, vision, out, norm_size=None
            )
        ),
    )
    media = Qwen3Media(grid=grid(vision))
    tower = _tower(layers, weights, media, out * (1 + len(deep)))
    return replace(tower, mergers=1 + len(deep), held=hidden)


def grid(vision: Config) -> QwenGrid:
    """How pixels become patches."""
    return QwenGrid(
        patch_size=vision.integer("patch_size"),
        merge_size=vision.integer("spatial_merge_size"),
        temporal_patch_size=vision.integer("temporal_patch_size"),
        channels=vision.integer("in_channels", default=3),
    )


def _section(config: Config, defaults: Mapping[str, Any]) -> Config:
    section = config.section("vision_config") or Config({}, name=config.name)
    return section.with_defaults(defaults)


def _layers(
    vision: Config, prefix: str, hidden: int, mlp: DenseMLP, *, norm_bias: bool
) -> VisionLayers:
    return VisionLayers(
        prefix=f"{prefix}.blocks",
        num_layers=vision.integer("depth", maximum=1000),
        hidden_size=hidden,
        attention=fused_attention(vision, hidden),
        mlp=mlp,
        norms=("norm1", "norm2"),
        norm_bias=norm_bias,
    )


def fused_attention(vision: Config, hidden: int, *, bias: bool = True) -> Attention:
    """Attention whose checkpoint holds `attn.qkv` and `attn.proj`.

    Raises:
        ConfigError: its heads do not divide the hidden size.
    """
    heads = vision.integer("num_heads")
    if hidden % heads:
        raise ConfigError(
            f"{vision.name} has num_heads = {heads}, which does not divide {hidden} features",
            hint="correct the config.json",
        )
    return vision_attention(
        heads,
        hidden // heads,
        module="attn",
        names=Projections(fused="qkv", output="proj"),
        qkv_bias=bias,
        output_bias=bias,
    )


def _patches(vision: Config, prefix: str, hidden: int, *, bias: bool) -> Iterator[Weight]:
    shape = grid(vision)
    kernel = (shape.channels, shape.temporal_patch_size, shape.patch_size, shape.patch_size)
    yield from convolution(f"{prefix}.patch_embed.proj", rows=hidden, kernel=kernel, bias=bias)


def _norm_merger(
    prefix: str, hidden: int, vision: Config, out: int, *, norm_bias: bool
) -> Iterator[Weight]:
    yield from norm(f"{prefix}.ln_q", hidden, WHERE, bias=norm_bias)
    yield from _two_layers(f"{prefix}.mlp.0", f"{prefix}.mlp.2", hidden, vision, out)


def _merger(
    prefix: str, hidden: int, vision: Config, out: int, *, norm_size: int | None
) -> Iterator[Weight]:
    merged = hidden * vision.integer("spatial_merge_size") ** 2
    yield from norm(f"{prefix}.norm", norm_size or merged, WHERE, bias=True)
    yield from _two_layers(f"{prefix}.linear_fc1", f"{prefix}.linear_fc2", hidden, vision, out)


def _two_layers(first: str, last: str, hidden: int, vision: Config, out: int) -> Iterator[Weight]:
    size = hidden * vision.integer("spatial_merge_size") ** 2
    merged = Axis(label="features of a merged patch", units=size)
    yield from column_parallel(first, merged, columns=size, where=WHERE, bias=True)
    yield from row_parallel(last, merged, rows=out, where=WHERE, bias=True)


def _tower(layers: VisionLayers, weights: tuple[Weight, ...], media: Media, out: int) -> Tower:
    return Tower(
        modalities=("image", "video"),
        weights=weights,
        media=media,
        hidden_size=layers.hidden_size,
        intermediate_size=layers.mlp.intermediate_size,
        num_heads=layers.attention.num_heads,
        head_dim=layers.attention.head_dim,
        num_layers=layers.num_layers,
        output_size=out,
        gated=layers.mlp.gated,
        rotary=True,
        data_parallel=True,
    )
