"""MoonViT3d of Kimi K2.5 and K3 (vLLM's `kimi_k25_vit.py`).

vLLM takes images and chunks of videos of K2.5 as one modality, `vision_chunk`. It replicates the
layers when their heads cannot be dealt, and the projector always, and quantizes neither: the
`ignore` lists of published checkpoints do not name them (`_maybe_ignore_quant_config`).
"""

from collections.abc import Iterator
from dataclasses import replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.linear import norm, replicated
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.base import Tower
from tightfit.model.towers.moon_media import MoonImages, MoonMedia
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    convolution,
    parameter,
    vision_attention,
    vision_mlp,
)

_K2_5 = {
    "vt_num_attention_heads": 16,
    "vt_num_hidden_layers": 27,
    "vt_hidden_size": 1152,
    "vt_intermediate_size": 4304,
    "mm_projector_type": "patchmerger",
    "norm_type": "layernorm",
    "attn_bias": True,
    "linear_bias": True,
    "patch_embed_proj_bias": True,
}
_K3 = {
    "vt_num_attention_heads": 12,
    "vt_num_hidden_layers": 27,
    "vt_hidden_size": 1024,
    "vt_intermediate_size": 4096,
    "qkv_hidden_size": 1536,
    "mm_projector_type": "patchmergerv2",
    "norm_type": "rmsnorm",
    "attn_bias": False,
    "linear_bias": False,
    "patch_embed_proj_bias": False,
}
"""Of vLLM's config classes."""


def moonvit_tower(config: Config, text_hidden_size: int, *, third: bool = False) -> Tower:
    """The tower of a Kimi K2.5, or of a K3.

    Raises:
        UnsupportedModelError: a norm or a projector that is not modelled.
    """
    section = config.section("vision_config") or Config({}, name=config.name)
    vision = section.with_defaults(_K3 if third else _K2_5)
    hidden, heads = vision.integer("vt_hidden_size"), vision.integer("vt_num_attention_heads")
    width = vision.integer("qkv_hidden_size", default=hidden)
    if width % heads:
        raise ConfigError(
            f"{vision.name} has vt_num_attention_heads = {heads}, which does not divide {width}",
            hint="correct the config.json",
        )
    kind = vision.text("norm_type")
    if kind not in ("layernorm", "rmsnorm"):
        raise UnsupportedModelError(f"norm_type {kind!r} in MoonViT is not modelled")
    attention = vision_attention(
        heads,
        width // heads,
        module="",
        names=Projections(fused="wqkv", output="wo"),
        qkv_bias=vision.boolean("attn_bias"),
        output_bias=vision.boolean("attn_bias"),
    )
    mlp = vision_mlp(
        vision.integer("vt_intermediate_size"),
        "gelu_pytorch_tanh",
        up="fc0",
        down="fc1",
        bias=vision.boolean("linear_bias"),
    )
    layers = VisionLayers(
        prefix="vision_tower.encoder.blocks",
        num_layers=vision.integer("vt_num_hidden_layers", maximum=1000),
        hidden_size=hidden,
        attention=attention,
        mlp=mlp,
        norms=("norm0", "norm1"),
        norm_bias=kind == "layernorm",
        whole_unless_heads_divide=True,
    )
    patch, merge = vision.integer("patch_size", default=14), _merge(vision)
    return Tower(
        modalities=("image",) if third else ("vision_chunk",),
        weights=tuple(replace(w, linear=False) for w in _weights(vision, layers, text_hidden_size)),
        media=MoonImages(patch_size=patch, merge_size=merge)
        if third
        else MoonMedia(
            patch_size=patch, merge_size=merge, patch_limit=16_384, frame_patch_limit=4096
        ),
        hidden_size=hidden,
        intermediate_size=mlp.intermediate_size,
        num_heads=heads,
        head_dim=attention.head_dim,
        num_layers=layers.num_layers,
        output_size=text_hidden_size,
        data_parallel=True,
        # Its table of rotations is complex64, half as many as a head has features.
        held=hidden + 2 * attention.head_dim,
    )


def _merge(vision: Config) -> int:
    sides = vision.integers("merge_kernel_size") or (2, 2)
    if len(sides) != 2 or sides[0] != sides[1] or sides[0] < 1:
        raise UnsupportedModelError(
            f"{vision.name} has merge_kernel_size = {list(sides)}, which is no square"
        )
    return sides[0]


def _weights(vision: Config, layers: VisionLayers, text_hidden_size: int) -> Iterator[Weight]:
    at, hidden, patch = "vision_tower", layers.hidden_size, vision.integer("patch_size", default=14)
    rows = vision.integer("init_pos_emb_height", default=64)
    columns = vision.integer("init_pos_emb_width", default=64)
    yield from convolution(
        f"{at}.patch_embed.proj",
        rows=hidden,
        kernel=(3, patch, patch),
        bias=vision.boolean("patch_embed_proj_bias"),
    )
    yield parameter(f"{at}.patch_embed.pos_emb.weight", rows, columns, hidden)
    yield from layers.weights()
    yield from norm(f"{at}.encoder.final_layernorm", hidden, WHERE, bias=layers.norm_bias)
    kind, merged = vision.text("mm_projector_type"), hidden * _merge(vision) ** 2
    if kind not in ("patchmerger", "patchmergerv2"):
        raise UnsupportedModelError(f"mm_projector_type {kind!r} is not modelled")
    second = kind == "patchmergerv2"
    names = ("linear_1", "linear_2") if second else ("proj.0", "proj.2")
    if not second:
        yield from norm("mm_projector.pre_norm", hidden, WHERE, bias=True)
    for name, outputs in zip(names, (merged, text_hidden_size), strict=True):
        yield from replicated(
            f"mm_projector.{name}", rows=outputs, columns=merged, where=WHERE, bias=not second
        )
    if second:
        yield from norm("mm_projector.post_norm", text_hidden_size, WHERE)
