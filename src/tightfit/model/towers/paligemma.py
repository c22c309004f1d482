"""PaliGemma: SigLIP and one linear layer (vLLM's `models/paligemma.py`)."""

from tightfit.model.config import Config
from tightfit.model.towers.base import Tower
from tightfit.model.towers.llava import FixedImages
from tightfit.model.towers.siglip import siglip
from tightfit.model.towers.vit import plain_linear

_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4096,
    "patch_size": 14,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "vision_use_head": False,
}
"""Of a `PaliGemmaConfig` without a `vision_config`."""


def paligemma_tower(config: Config, text_hidden_size: int) -> Tower:
    """The tower of a `PaliGemmaForConditionalGeneration`; a prompt has one image."""
    section = config.section("vision_config")
    vision = siglip(section or Config({}, name=config.name).with_defaults(_DEFAULTS))
    width = config.integer("projection_dim", default=2048)
    return Tower(
        modalities=("image",),
        weights=(
            *vision.weights("vision_tower.vision_model"),
            *plain_linear("multi_modal_projector.linear", rows=width, columns=vision.hidden_size),
        ),
        media=FixedImages(patches=vision.patches, tokens=vision.patches, pixels=vision.pixels),
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads,
        head_dim=vision.head_dim,
        num_layers=vision.num_layers,
        output_size=text_hidden_size,
        most_items={"image": 1},
    )
