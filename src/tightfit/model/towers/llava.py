"""LLaVA's images: one size, and the features of an inner layer of CLIP or SigLIP."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.linear import column_parallel, row_parallel
from tightfit.model.config import Config
from tightfit.model.layout import Axis, Weight
from tightfit.model.towers.base import Item, Media, Sizes, Tower
from tightfit.model.towers.clip import clip, feature_layers
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
    """The tower of a `LlavaForConditionalGeneration` with CLIP.

    vLLM builds only the layers up to the one whose output is used, and no last norm.

    Raises:
        UnsupportedModelError: an encoder or a selection that is not modelled.
    """
    section = config.section("vision_config") or Config({}, name=config.name)
    kind = section.text("model_type", default="clip_vision_model")
    if kind != "clip_vision_model":
        raise UnsupportedModelError(f"LLaVA with an encoder {kind!r} is not modelled")
    vision = clip(section)
    layers = feature_layers(
        config, "vision_feature_layer", vision.num_layers, DEFAULT_FEATURE_LAYER
    )
    several = config.raw("vision_feature_layer", default=DEFAULT_FEATURE_LAYER)
    features = vision.hidden_size * (len(several) if isinstance(several, list) else 1)
    strategy = config.text("vision_feature_select_strategy", default="default")
    tokens = {"default": vision.patches, "full": vision.patches + 1, "class": 1}.get(strategy)
    if tokens is None:
        raise UnsupportedModelError(
            f"vision_feature_select_strategy {strategy!r} is not modelled",
            hint="known: default, full, class",
        )
    prefix = "vision_tower.vision_model"
    bias = config.boolean("multimodal_projector_bias", default=True)
    return Tower(
        modalities=("image",),
        weights=(*vision.weights(prefix), *_projector(features, text_hidden_size, bias)),
        media=FixedImages(patches=vision.patches + 1, tokens=tokens, pixels=vision.pixels),
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads,
        head_dim=vision.head_dim,
        num_layers=layers,
        output_size=text_hidden_size,
        unbuilt=vision.unbuilt(prefix, layers),
        held=vision.hidden_size,
    )


def _projector(features: int, text_hidden_size: int, bias: bool) -> Iterator[Weight]:
    at = "multi_modal_projector"
    inner = Axis(label="hidden_size of the projector", units=text_hidden_size)
    yield from column_parallel(f"{at}.linear_1", inner, columns=features, where=WHERE, bias=bias)
    yield from row_parallel(f"{at}.linear_2", inner, rows=text_hidden_size, where=WHERE, bias=bias)
