"""What a checkpoint's `quantization_config` does to the shapes and dtypes of its parameters."""

from collections.abc import Iterator
from dataclasses import replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.spec import BlockQuantization, ModelSpec
from tightfit.units import cdiv


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


def in_blocks(weight: Weight, scheme: BlockQuantization) -> Iterator[Weight]:
    """A linear weight as e4m3 with `weight_scale_inv`, float32, one per block."""
    modules = {part.source.removesuffix(".weight") for part in weight.parts}
    skipped = any(
        module == name or module.startswith(f"{name}.")
        for module in modules
        for name in scheme.ignored
    )
    if not weight.linear or skipped:
        yield weight
        return
    assert weight.columns is not None
    yield replace(weight, dtype="F8_E4M3")
    rows, columns = scheme.block_rows, scheme.block_columns
    yield replace(
        weight,
        name=f"{weight.name}_scale_inv",
        dtype="F32",
        parts=tuple(
            replace(
                part,
                source=f"{part.source}_scale_inv",
                rows=cdiv(part.rows, rows),
                axis=part.axis and part.axis.in_blocks(rows),
                first_row=part.first_row // rows,
                source_rows=cdiv(part.source_rows, rows),
            )
            for part in weight.parts
        ),
        columns=cdiv(weight.columns, columns),
        input_axis=weight.input_axis and weight.input_axis.in_blocks(columns),
    )
