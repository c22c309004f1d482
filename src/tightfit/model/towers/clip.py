"""CLIP's vision encoder (vLLM's `models/clip.py`), of which models use an inner layer's output."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tightfit.errors import ConfigError
from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.linear import norm
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.vision_config import VisionSizes, check_multiple, vision_sizes
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    convolution,
    parameter,
    vision_attention,
    vision_mlp,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip(VisionSizes):
    """Its sizes; the encoder also sees a class token."""

    def weights(self, prefix: str) -> Iterator[Weight]:
        """Class token, patches, positions, layers; `prefix` ends in `vision_model`."""
        at, size = f"{prefix}.embeddings", self.hidden_size
        kernel = (self.channels, self.patch_size, self.patch_size)
        yield parameter(f"{at}.class_embedding", size)
        yield from convolution(f"{at}.patch_embedding", rows=size, kernel=kernel, bias=False)
        yield parameter(f"{at}.position_embedding.weight", self.patches + 1, size)
        yield from norm(f"{prefix}.pre_layrnorm", size, WHERE, bias=True)
        yield from self.layers(prefix).weights()
        yield from norm(f"{prefix}.post_layernorm", size, WHERE, bias=True)

    def unbuilt(self, prefix: str, layers: int, *, last_norm: bool = True) -> frozenset[str]:
        """Names of what vLLM leaves out when `layers` layers are enough.

        `last_norm` says that it builds the last norm if all of them are needed.
        """
        return left_out(self.layers(prefix), prefix, layers, last_norm=last_norm)

    def layers(self, prefix: str) -> VisionLayers:
        """The layers of the encoder."""
        return VisionLayers(
            prefix=f"{prefix}.encoder.layers",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            attention=vision_attention(
                self.num_heads, self.head_dim, names=Projections(output="out_proj")
            ),
            mlp=vision_mlp(self.intermediate_size, self.activation),
        )


def left_out(every: VisionLayers, prefix: str, layers: int, *, last_norm: bool) -> frozenset[str]:
    """Names of what follows the first `layers` layers of an encoder, and of its last norm."""
    if layers >= every.num_layers and last_norm:
        return frozenset()
    late = (weight for i in range(layers, every.num_layers) for weight in every.layer(i))
    last = norm(f"{prefix}.post_layernorm", every.hidden_size, WHERE, bias=True)
    return frozenset(weight.name for weight in (*late, *last))


def clip(config: Config) -> Clip:
    """Read a `vision_config`; what it leaves out is as in `CLIPVisionConfig`.

    Raises:
        ConfigError: its heads or patches do not divide.
    """
    sizes = vision_sizes(config, patch_size=32, activation="quick_gelu")
    image, patch = ("image_size", sizes.image_size), ("patch_size", sizes.patch_size)
    check_multiple(config, image, patch)
    return Clip(**asdict(sizes))


def feature_layers(config: Config, key: str, num_layers: int, default: int) -> int:
    """How many layers a model needs whose features come from layer `key`, or from several.

    A list names hidden states, of which number 0 is the input of the first layer; a negative one
    counts from the end (vLLM's `llava.py: _get_num_hidden_layers`).

    Raises:
        ConfigError: there is no such layer.
    """
    given = config.raw(key, default=default)
    layers = given if isinstance(given, list) else [given]
    found = []
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not layers:
            raise ConfigError(
                f"{config.name} has {key} = {str(given)[:40]!r}, which names no layers",
                hint="correct the config.json",
            )
        found.append(num_layers + layer + 1 if layer < 0 else layer)
    if not found or not 0 <= min(found) <= max(found) <= num_layers:
        raise ConfigError(
            f"{config.name} has {key} = {str(given)[:40]!r}, and the encoder has "
            f"{num_layers} layers",
            hint="correct the config.json",
        )
    return max(found)
