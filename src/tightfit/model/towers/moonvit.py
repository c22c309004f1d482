"""MoonViT of Kimi-VL (vLLM's `moonvit.py`), MoonViT3d of Kimi K2.5 and K3 (`kimi_k25_vit.py`).

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
from tightfit.model.towers.base import Media, Tower
from tightfit.model.towers.moon_media import FirstMoonImages, MoonImages, MoonMedia
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


_FIRST = {
    "vt_num_attention_heads": "num_attention_heads",
    "vt_num_hidden_layers": "num_hidden_layers",
    "vt_hidden_size": "hidden_size",
    "vt_intermediate_size": "intermediate_size",
}
"""What the configs of Kimi-VL call them."""


def moonvit_tower(config: Config, text_hidden_size: int, *, third: bool = False) -> Tower:
    """The tower of a Kimi K2.5, or of a K3.

    Raises:
        UnsupportedModelError: a norm or a projector that is not modelled.
    """
    section = config.section("vision_config") or Config({}, name=config.name)
    vision = section.with_defaults(_K3 if third else _K2_5)
    patch, merge = vision.integer("patch_size", default=14), _merge(vision)
    media: Media = MoonMedia(
        patch_size=patch, merge_size=merge, patch_limit=16_384, frame_patch_limit=4096
    )
    if third:
        media = MoonImages(patch_size=patch, merge_size=merge)
    return _tower(vision, text_hidden_size, media, "image" if third else "vision_chunk")


def first_moonvit_tower(config: Config, text_hidden_size: int) -> Tower:
    """The tower of a Kimi-VL, whose layers vLLM always cuts.

    Raises:
        UnsupportedModelError: patches are not merged in squares.
    """
    section = config.section("vision_config") or Config({}, name=config.name)
    vision = section.renamed(_FIRST).with_defaults({**_K2_5, "mm_projector_type": "first"})
    patch = vision.integer("patch_size", default=14)
    media = FirstMoonImages(patch_size=patch, merge_size=_merge(vision))
    return _tower(vision, text_hidden_size, media, "image")


def _tower(vision: Config, text_hidden_size: int, media: Media, modality: str) -> Tower:
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
        whole_unless_heads_divide=vision.text("mm_projector_type") != "first",
    )
    return Tower(
        modalities=(modality,),
        weights=tuple(replace(w, linear=False) for w in _weights(vision, layers, text_hidden_size)),
        media=media,
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
    if kind not in _PROJECTORS:
        raise UnsupportedModelError(f"mm_projector_type {kind!r} is not modelled")
    at, names = _PROJECTORS[kind]
    second = kind == "patchmergerv2"
    if not second:
        yield from norm(f"{at}.pre_norm", hidden, WHERE, bias=True)
    for name, outputs in zip(names, (merged, text_hidden_size), strict=True):
        yield from replicated(
            f"{at}.{name}", rows=outputs, columns=merged, where=WHERE, bias=not second
        )
    if second:
        yield from norm(f"{at}.post_norm", text_hidden_size, WHERE)


_PROJECTORS = {
    "patchmerger": ("mm_projector", ("proj.0", "proj.2")),
    "patchmergerv2": ("mm_projector", ("linear_1", "linear_2")),
    "first": ("multi_modal_projector", ("linear_1", "linear_2")),
}
"""Their modules; `first` is Kimi-VL's, which needs no name."""
