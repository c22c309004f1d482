"""What CLIP's and SigLIP's encoders have in common: the sizes of a `vision_config`."""

from dataclasses import dataclass

from tightfit.errors import ConfigError
from tightfit.model.config import Config

_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
"""Of `CLIPVisionConfig` and `SiglipVisionConfig`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSizes:
    """Sizes of an encoder of square images in square patches."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    channels: int
    activation: str

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_heads

    @property
    def pixels(self) -> int:
        """Elements of an image."""
        return self.channels * self.image_size**2


def vision_sizes(config: Config, *, patch_size: int, activation: str) -> VisionSizes:
    """Read a `vision_config`; the arguments are the defaults of its class.

    Raises:
        ConfigError: its heads do not divide the hidden size.
    """
    config = config.with_defaults(_DEFAULTS | {"patch_size": patch_size})
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    check_multiple(config, ("hidden_size", hidden), ("num_attention_heads", heads))
    return VisionSizes(
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers", maximum=1000),
        num_heads=heads,
        image_size=config.integer("image_size"),
        patch_size=config.integer("patch_size"),
        channels=config.integer("num_channels"),
        activation=config.text("hidden_act", default=activation),
    )


def check_multiple(config: Config, whole: tuple[str, int], part: tuple[str, int]) -> None:
    """Refuse sizes that do not divide.

    Raises:
        ConfigError: the names of both, and their values.
    """
    if whole[1] % part[1]:
        raise ConfigError(
            f"{config.name} has {whole[0]} = {whole[1]}, which is not a multiple of "
            f"{part[0]} = {part[1]}",
            hint="correct the config.json",
        )
