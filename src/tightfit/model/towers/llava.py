"""LLaVA's images: mostly of one size, and the features of a layer of CLIP, SigLIP or Pixtral."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.linear import column_parallel, row_parallel
from tightfit.model.config import Config
from tightfit.model.layout import Axis, Weight
from tightfit.model.towers.base import Item, Media, Sizes, Tower
from tightfit.model.towers.clip import Clip, clip, feature_layers
from tightfit.model.towers.pixtral import pixtral_tower, pixtral_width
from tightfit.model.towers.siglip import siglip
from tightfit.model.towers.vit import WHERE

DEFAULT_FEATURE_LAYER = -2
"""Of `LlavaConfig`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedImages(Media):
    """Every image is resized to the same size."""

    patches: int
    tokens: int
    pixels: int

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """The image."""
        return (
            Item(modality="image", patches=self.patches, tokens=self.tokens, inputs=self.pixels),
        )


def llava_tower(config: Config, text_hidden_size: int) -> Tower:
    """The tower of a `LlavaForConditionalGeneration` with CLIP, SigLIP or Pixtral.

    vLLM builds only the layers up to the one whose output is used, and no last norm.

    Raises:
        UnsupportedModelError: an encoder or a selection that is not modelled.
    """
    section = config.section("vision_config") or Config({}, name=config.name)
    kind = section.text("model_type", default="clip_vision_model")
    several = config.raw("vision_feature_layer", default=DEFAULT_FEATURE_LAYER)
    count = len(several) if isinstance(several, list) else 1
    bias = config.boolean("multimodal_projector_bias", default=True)
    strategy = config.text("vision_feature_select_strategy", default="default")
    if kind == "pixtral":
        # It has no class token to leave out, and vLLM selects all of its patches.
        if strategy != "full":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {strategy!r} with Pixtral is not modelled",
                hint="known: full",
            )
        features = pixtral_width(config) * count
        return pixtral_tower(
            config, text_hidden_size, tuple(projector(features, text_hidden_size, bias))
        )
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedModelError(f"LLaVA with an encoder {kind!r} is not modelled")
    vision = clip(section) if kind == "clip_vision_model" else siglip(section)
    layers = feature_layers(
        config, "vision_feature_layer", vision.num_layers, DEFAULT_FEATURE_LAYER
    )
    positions = vision.patches + isinstance(vision, Clip)
    # vLLM leaves out the first position by default, though SigLIP's is a patch.
    tokens = {"default": positions - 1, "full": positions, "class": 1}.get(strategy)
    if tokens is None:
        raise UnsupportedModelError(
            f"vision_feature_select_strategy {strategy!r} is not modelled",
            hint="known: default, full, class",
        )
    prefix = "vision_tower.vision_model"
    return Tower(
        modalities=("image",),
        weights=(
            *vision.weights(prefix),
            *projector(vision.hidden_size * count, text_hidden_size, bias),
        ),
        media=FixedImages(patches=positions, tokens=tokens, pixels=vision.pixels),
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads,
        head_dim=vision.head_dim,
        num_layers=layers,
        output_size=text_hidden_size,
        unbuilt=vision.unbuilt(prefix, layers, last_norm=False),
        held=vision.hidden_size,
    )


def projector(features: int, text_hidden_size: int, bias: bool) -> Iterator[Weight]:
    """Two linear layers, the first cut by its output and the second by its input."""
    at = "multi_modal_projector"
    inner = Axis(label="hidden_size of the projector", units=text_hidden_size)
    yield from column_parallel(f"{at}.linear_1", inner, columns=features, where=WHERE, bias=bias)
    yield from row_parallel(f"{at}.linear_2", inner, rows=text_hidden_size, where=WHERE, bias=bias)
