"""SigLIP's vision encoder, without its pooling head (vLLM's `models/siglip.py`)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tightfit.errors import ConfigError
from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.linear import norm
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.clip import left_out
from tightfit.model.towers.vision_config import VisionSizes, vision_sizes
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Siglip(VisionSizes):
    """Its sizes, and whether it has a pooling head."""

    has_head: bool

    def weights(self, prefix: str) -> Iterator[Weight]:
        """Patches, positions, layers, the last norm; `prefix` ends in `vision_model`."""
        at, size = f"{prefix}.embeddings", self.hidden_size
        kernel = (self.channels, self.patch_size, self.patch_size)
        yield from convolution(f"{at}.patch_embedding", rows=size, kernel=kernel, bias=True)
        yield parameter(f"{at}.position_embedding.weight", self.patches, size)
        yield from self.layers(prefix).weights()
        yield from norm(f"{prefix}.post_layernorm", size, WHERE, bias=True)
        if self.has_head:
            yield from pooling_head(f"{prefix}.head", size, self.intermediate_size)

    def unbuilt(self, prefix: str, layers: int, *, last_norm: bool = True) -> frozenset[str]:
        """Names of what vLLM leaves out when `layers` layers are enough; see `Clip`."""
        return left_out(self.layers(prefix), prefix, layers, last_norm=last_norm)

    def layers(self, prefix: str) -> VisionLayers:
        """The layers of the encoder."""
        return VisionLayers(
            prefix=f"{prefix}.encoder.layers",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            attention=vision_attention(self.num_heads, self.head_dim, names=PROJECTIONS),
            mlp=vision_mlp(self.intermediate_size, self.activation),
        )


def siglip(config: Config) -> Siglip:
    """Read a `vision_config`; what it leaves out is as in `SiglipVisionConfig`.

    Raises:
        ConfigError: its heads do not divide the hidden size, or no patch fits.
    """
    sizes = vision_sizes(config, patch_size=16, activation="gelu_pytorch_tanh")
    image, patch = sizes.image_size, sizes.patch_size
    if patch > image:
        raise ConfigError(
            f"{config.name} has patch_size = {patch}, which is more than image_size = {image}",
            hint="correct the config.json",
        )
    return Siglip(**asdict(sizes), has_head=config.boolean("vision_use_head", default=True))
