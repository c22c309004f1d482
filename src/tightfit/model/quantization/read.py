"""Read `quantization_config` of a `config.json`."""

from dataclasses import replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.quantization.fp8_block import BlockQuantization
from tightfit.model.spec import ModelSpec


def read_quantization(config: Config, spec: ModelSpec) -> ModelSpec:
    """Add the checkpoint's quantization to the spec.

    Raises:
        UnsupportedModelError: a method whose layout on disk is not modelled.
    """
    section = config.section("quantization_config")
    if section is None:
        return spec
    method = section.text("quant_method", default="unnamed")
    blocks = section.integers("weight_block_size")
    if method != "fp8" or not blocks:
        raise UnsupportedModelError(
            f"quantization_config with quant_method {method!r} is not modelled",
            hint="modelled: fp8 with weight_block_size (block-wise fp8)",
        )
    if len(blocks) != 2 or min(blocks) < 1:
        raise ConfigError(
            f"quantization_config has weight_block_size = {list(blocks)}, not two sizes",
            hint="correct the config.json",
        )
    ignored = section.strings("modules_to_not_convert") or section.strings("ignored_layers")
    return replace(
        spec,
        quantization=BlockQuantization(
            block_rows=blocks[0], block_columns=blocks[1], ignored=ignored
        ),
    )
