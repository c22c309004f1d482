"""DeepSeek-VL2: timm's SigLIP on tiles, and a projector (vLLM's `deepseek_vl2.py`)."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.base import Place
from tightfit.model.blocks.linear import norm
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.base import Item, Media, Sizes, Tower, size_limit
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    convolution,
    parameter,
    plain_linear,
    uncut,
    vision_attention,
    vision_mlp,
)
from tightfit.units import cdiv

_WIDTH, _LAYERS, _HEADS, _INNER, _PATCH, _SIDE = 1152, 27, 16, 4304, 14, 27
_TILE = 384
"""Of `vit_so400m_patch14_siglip_384.webli`, which vLLM builds whatever the config says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledImages(Media):
    """An image is fitted into one of several resolutions, cut into tiles, and seen as a whole."""

    resolutions: tuple[tuple[int, int], ...]
    """Heights and widths."""
    downsample: int

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """The resolution with the most embeddings, of which every line has one more.

        Limits of the size choose another resolution.
        """
        height, width = max(self.resolutions, key=self._tokens)
        limited = (
            size_limit(sizes, "image", "height", height),
            size_limit(sizes, "image", "width", width),
        )
        best = self._fitting(*limited)
        tiles = 1 + (best[0] // _TILE) * (best[1] // _TILE)
        return (
            Item(
                modality="image",
                patches=tiles * _SIDE**2,
                tokens=self._tokens(best),
                inputs=tiles * 3 * _TILE**2,
            ),
        )

    def _tokens(self, size: tuple[int, int]) -> int:
        side = cdiv(_TILE // _PATCH, self.downsample)
        rows, columns = size[0] // _TILE, size[1] // _TILE
        return side * (side + 1) + rows * side * (columns * side + 1) + 1

    def _fitting(self, height: int, width: int) -> tuple[int, int]:
        """The resolution that keeps most pixels, and of those the one that wastes fewest."""

        def merit(size: tuple[int, int]) -> tuple[int, int]:
            scale = min(size[1] / width, size[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - size[0] * size[1]

        return max(self.resolutions, key=merit)


def deepseek_vl2_tower(config: Config) -> Tower:
    """The tower of a `DeepseekVLV2ForCausalLM`.

    Under tensor parallelism vLLM cuts only the MLPs of the encoder.

    Raises:
        UnsupportedModelError: a projector that is not modelled.
        ConfigError: resolutions that are not pairs of sizes.
    """
    projector = config.section("projector_config") or Config({}, name=config.name)
    kind = projector.text("projector_type", default="downsample_mlp_gelu")
    if kind != "downsample_mlp_gelu" or projector.integer("depth", default=2) != 2:
        raise UnsupportedModelError(f"projector_type {kind!r} of another depth is not modelled")
    if config.text("tile_tag", default="2D") != "2D":
        raise UnsupportedModelError(f"tile_tag {config.text('tile_tag')!r} is not modelled")
    downsample = projector.integer("downsample_ratio", default=2)
    features = projector.integer("n_embed", default=2048)
    layers = VisionLayers(
        prefix="vision.blocks",
        num_layers=_LAYERS,
        hidden_size=_WIDTH,
        attention=vision_attention(
            _HEADS,
            _WIDTH // _HEADS,
            module="attn",
            names=Projections(fused="qkv", output="proj"),
        ),
        mlp=vision_mlp(_INNER, "gelu"),
        norms=("norm1", "norm2"),
    )
    inner = features * projector.integer("mlp_ratio", default=1)
    merged = projector.integer("input_dim", default=_WIDTH) * downsample**2
    weights = (
        *_encoder(layers),
        *plain_linear("projector.layers.0", rows=inner, columns=merged),
        *plain_linear("projector.layers.2", rows=features, columns=inner),
        parameter("image_newline", features),
        parameter("view_seperator", features),
    )
    return Tower(
        modalities=("image",),
        weights=weights,
        media=TiledImages(resolutions=_resolutions(config), downsample=downsample),
        hidden_size=_WIDTH,
        intermediate_size=_INNER,
        num_heads=_HEADS,
        head_dim=_WIDTH // _HEADS,
        num_layers=_LAYERS,
        output_size=features,
        held=_WIDTH,
    )


def _encoder(layers: VisionLayers) -> Iterator[Weight]:
    yield from convolution(
        "vision.patch_embed.proj", rows=_WIDTH, kernel=(3, _PATCH, _PATCH), bias=True
    )
    yield parameter("vision.pos_embed", 1, _SIDE**2, _WIDTH)
    for weight in layers.weights():
        yield uncut(weight) if ".attn." in weight.name else weight
    yield from norm("vision.norm", _WIDTH, WHERE, bias=True)
    at = "vision.attn_pool"
    yield parameter(f"{at}.latent", 1, 1, _WIDTH)
    for name, rows in (("q", _WIDTH), ("kv", 2 * _WIDTH), ("proj", _WIDTH)):
        yield from plain_linear(f"{at}.{name}", rows=rows, columns=_WIDTH)
    yield from norm(f"{at}.norm", _WIDTH, WHERE, bias=True)
    place = Place(prefix=at, where=WHERE, hidden_size=_WIDTH)
    yield from layers.mlp.weights(place)


def _resolutions(config: Config) -> tuple[tuple[int, int], ...]:
    given = config.raw("candidate_resolutions", default=[[_TILE, _TILE]])
    found = []
    for pair in given if isinstance(given, list) else [given]:
        sizes = pair if isinstance(pair, list) else []
        if len(sizes) != 2 or not all(isinstance(s, int) and _TILE <= s < 10**6 for s in sizes):
            raise ConfigError(
                f"{config.name} has {str(pair)[:40]!r} among candidate_resolutions, which is no "
                "height and width",
                hint="correct the config.json",
            )
        found.append((sizes[0], sizes[1]))
    return tuple(found) or ((_TILE, _TILE),)
