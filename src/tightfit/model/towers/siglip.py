"""SigLIP's vision encoder, without its pooling head (vLLM's `models/siglip.py`)."""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.errors import ConfigError
from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.linear import norm
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    convolution,
    parameter,
    pooling_head,
    vision_attention,
    vision_mlp,
)

PROJECTIONS = Projections(output="out_proj")
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Siglip:
    """Its sizes, read from a `vision_config`."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    channels: int
    activation: str
    has_head: bool

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_heads

    def weights(self, prefix: str) -> Iterator[Weight]:
        """Patches, positions, layers, the last norm; `prefix` ends in `vision_model`."""
        at, size = f"{prefix}.embeddings", self.hidden_size
        kernel = (self.channels, self.patch_size, self.patch_size)
        yield from convolution(f"{at}.patch_embedding", rows=size, kernel=kernel, bias=True)
        yield parameter(f"{at}.position_embedding.weight", self.patches, size)
        yield from VisionLayers(
            prefix=f"{prefix}.encoder.layers",
            num_layers=self.num_layers,
            hidden_size=size,
            attention=vision_attention(self.num_heads, self.head_dim, names=PROJECTIONS),
            mlp=vision_mlp(self.intermediate_size, self.activation),
        ).weights()
        yield from norm(f"{prefix}.post_layernorm", size, WHERE, bias=True)
        if self.has_head:
            yield from pooling_head(f"{prefix}.head", size, self.intermediate_size)


def siglip(config: Config) -> Siglip:
    """Read a `vision_config`; what it leaves out is as in `SiglipVisionConfig`.

    Raises:
        ConfigError: its heads do not divide the hidden size, or no patch fits.
    """
    config = config.with_defaults(_DEFAULTS)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % heads:
        raise ConfigError(
            f"{config.name} has hidden_size = {hidden}, which is not a multiple of "
            f"num_attention_heads = {heads}",
            hint="correct the config.json",
        )
    image, patch = config.integer("image_size"), config.integer("patch_size")
    if patch > image:
        raise ConfigError(
            f"{config.name} has patch_size = {patch}, which is more than image_size = {image}",
            hint="correct the config.json",
        )
    return Siglip(
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers", maximum=1000),
        num_heads=heads,
        image_size=image,
        patch_size=patch,
        channels=config.integer("num_channels"),
        activation=config.text("hidden_act", default="gelu_pytorch_tanh"),
        has_head=config.boolean("vision_use_head", default=True),
    )
