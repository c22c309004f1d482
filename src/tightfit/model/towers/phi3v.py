"""Phi-3-vision and Phi-3.5-vision: CLIP on crops of an image (vLLM's `phi3v.py`)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from tightfit.errors import UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.towers.base import Item, Media, Sizes, Tower, size_limit, whole_number
from tightfit.model.towers.clip import clip, feature_layers
from tightfit.model.towers.vit import parameter, plain_linear

CROP = 336
MOST_CROPS = 4096
PROFILED_HEIGHT, PROFILED_WIDTH = 8000, 50
"""Pixels of the image that vLLM profiles (`get_image_size_with_most_features`)."""

_CLIP = {
    "hidden_size": 1024,
    "image_size": CROP,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
"""vLLM's `CLIP_VIT_LARGE_PATCH14_336_CONFIG`; configs only name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phi3VImages(Media):
    """Up to `num_crops` crops in a grid, and the whole image.

    Source: `calc_num_image_tokens_from_image_size` of the published processor, which pads every
    image to `num_crops + 1` crops. 16 is the number of Phi-3-vision; Phi-3.5-vision has 4 in its
    `preprocessor_config.json`.
    """

    num_crops: int = 16

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """A very tall image, which has most ends of lines.

        Limits of the size make the grid smaller, though not what the encoder sees.
        """
        crops = whole_number(processor, "num_crops", self.num_crops)
        if crops > MOST_CROPS:
            crops = MOST_CROPS
        height = size_limit(sizes, "image", "height", PROFILED_HEIGHT)
        width = size_limit(sizes, "image", "width", PROFILED_WIDTH)
        rows, columns = self._grid(height, width, crops)
        tokens = (rows * columns + 1) * 144 + 1 + (rows + 1) * 12
        seen = crops + 1
        pixels = seen * 3 * CROP**2
        patches = seen * ((CROP // _PATCH) ** 2 + 1)
        return (Item(modality="image", patches=patches, tokens=tokens, inputs=pixels),)

    @staticmethod
    def _grid(height: int, width: int, crops: int) -> tuple[int, int]:
        """Crops down and across: as many across the longer side as the number allows."""
        longer, shorter = max(height, width), min(height, width)
        ratio, scale = longer / shorter, 1
        while (scale + 1) * ceil((scale + 1) / ratio) <= crops:
            scale += 1
        across = ceil(int(scale * CROP / ratio) / CROP) or 1
        return (scale, across) if height > width else (across, scale)


_PATCH = 14


def phi3v_tower(config: Config, text_hidden_size: int) -> Tower:
    """CLIP up to the layer that is used, learned separators, and a projector.

    Raises:
        UnsupportedModelError: another encoder, or another arrangement of crops.
    """
    section = config.section("img_processor") or Config({}, name=config.name)
    kind = section.text("name", default="clip_vision_model")
    if kind != "clip_vision_model":
        raise UnsupportedModelError(f"img_processor {kind!r} is not modelled")
    embedding = config.section("embd_layer") or Config({}, name=config.name)
    if not (
        embedding.boolean("use_hd_transform") and embedding.boolean("with_learnable_separator")
    ):
        raise UnsupportedModelError("Phi-3-vision without hd_transform is not modelled")
    vision = clip(Config(_CLIP, name=config.name))
    layers = feature_layers(section, "layer_idx", vision.num_layers, -2)
    at = "model.vision_embed_tokens"
    prefix, merged = f"{at}.img_processor.vision_model", 4 * section.integer("image_dim_out")
    weights = (
        *vision.weights(prefix),
        parameter(f"{at}.glb_GN", 1, 1, merged),
        parameter(f"{at}.sub_GN", 1, 1, 1, merged),
        *plain_linear(f"{at}.img_projection.0", rows=text_hidden_size, columns=merged),
        *plain_linear(f"{at}.img_projection.2", rows=text_hidden_size, columns=text_hidden_size),
    )
    return Tower(
        modalities=("image",),
        weights=weights,
        media=Phi3VImages(),
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads,
        head_dim=vision.head_dim,
        num_layers=layers,
        output_size=text_hidden_size,
        unbuilt=vision.unbuilt(prefix, layers),
        held=vision.hidden_size,
    )
