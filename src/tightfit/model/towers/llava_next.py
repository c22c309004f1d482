"""LLaVA-NeXT and LLaVA-OneVision: CLIP or SigLIP up to a layer, a projector, and ends of lines.

Sources: vLLM's `llava_next.py` and `llava_onevision.py`; the defaults are transformers'.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.linear import vector
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.anyres import AnyResolution, Size
from tightfit.model.towers.base import Tower
from tightfit.model.towers.clip import Clip, clip, feature_layers
from tightfit.model.towers.llava import projector
from tightfit.model.towers.siglip import Siglip, siglip
from tightfit.model.towers.vit import WHERE, plain_linear

_CLIP: Mapping[str, Any] = {
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
_SIGLIP: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "vision_use_head": False,
}
"""Of models whose config has no `vision_config`."""
_NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_ONE_VISION = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
_PREFIX = "vision_tower.vision_model"


def llava_next_tower(config: Config, text_hidden_size: int, *, one_vision: bool = False) -> Tower:
    """The tower of a `LlavaNextForConditionalGeneration`, or of a LLaVA-OneVision.

    vLLM builds only the layers up to the one whose output is used, and no last norm.

    Raises:
        UnsupportedModelError: an encoder or a selection that is not modelled.
    """
    vision = _vision(config, one_vision)
    default = -1 if one_vision else -2
    layers = feature_layers(config, "vision_feature_layer", vision.num_layers, default)
    several = config.raw("vision_feature_layer", default=default)
    features = vision.hidden_size * (len(several) if isinstance(several, list) else 1)
    positions = vision.patches + isinstance(vision, Clip)
    strategy = config.text(
        "vision_feature_select_strategy", default="full" if one_vision else "default"
    )
    if strategy not in ("default", "full"):
        raise UnsupportedModelError(
            f"vision_feature_select_strategy {strategy!r} is not modelled",
            hint="known: default, full",
        )
    selected = positions - (strategy == "default")
    ratio = config.text("vision_aspect_ratio", default="anyres_max_9")
    if one_vision and ratio != "anyres_max_9":
        raise UnsupportedModelError(f"vision_aspect_ratio {ratio!r} is not modelled")
    return Tower(
        modalities=("image", "video") if one_vision else ("image",),
        weights=tuple(_weights(config, vision, features, text_hidden_size, one_vision)),
        media=AnyResolution(
            image_size=vision.image_size,
            grid=vision.image_size // vision.patch_size,
            base=selected,
            positions=positions,
            channels=vision.channels,
            resolutions=_resolutions(config, _ONE_VISION if one_vision else _NEXT),
            one_vision=one_vision,
        ),
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads,
        head_dim=vision.head_dim,
        num_layers=layers,
        output_size=text_hidden_size,
        unbuilt=vision.unbuilt(_PREFIX, layers, last_norm=False),
        held=vision.hidden_size,
    )


def _vision(config: Config, one_vision: bool) -> Clip | Siglip:
    section = config.section("vision_config")
    if section is None:
        empty = Config({}, name=config.name)
        return (
            siglip(empty.with_defaults(_SIGLIP)) if one_vision else clip(empty.with_defaults(_CLIP))
        )
    kind = section.text(
        "model_type", default="siglip_vision_model" if one_vision else "clip_vision_model"
    )
    if kind == "clip_vision_model":
        return clip(section)
    if kind == "siglip_vision_model":
        return siglip(section)
    raise UnsupportedModelError(
        f"LLaVA with an encoder {kind!r} is not modelled",
        hint="known: clip_vision_model, siglip_vision_model",
    )


def _weights(
    config: Config, vision: Clip | Siglip, features: int, text_hidden: int, one_vision: bool
) -> Iterator[Weight]:
    yield from vision.weights(_PREFIX)
    yield vector("image_newline", text_hidden, WHERE)
    bias = config.boolean("multimodal_projector_bias", default=True)
    if not one_vision:
        yield from projector(features, text_hidden, bias)
        return
    at = "multi_modal_projector"
    for name, columns in (("linear_1", features), ("linear_2", text_hidden)):
        yield from plain_linear(f"{at}.{name}", rows=text_hidden, columns=columns, bias=bias)


def _resolutions(config: Config, default: tuple[Size, ...]) -> tuple[Size, ...]:
    """`image_grid_pinpoints`, each a height and a width.

    Raises:
        ConfigError: something else is there.
    """
    given = config.raw("image_grid_pinpoints")
    if given is None:
        return default
    pairs = given if isinstance(given, list) else [given]
    for pair in pairs:
        sizes = pair if isinstance(pair, list) else []
        if len(sizes) != 2 or not all(type(side) is int and side > 0 for side in sizes):
            raise ConfigError(
                f"{config.name} has image_grid_pinpoints = {str(given)[:60]}, which should be "
                "pairs of a height and a width",
                hint="correct the config.json, or download it again",
            )
    return tuple((pair[0], pair[1]) for pair in pairs) or default
