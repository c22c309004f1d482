"""DeepSeek-style fp8: e4m3 weights with one float32 scale per block of rows and columns."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tightfit.model.layout import Weight
from tightfit.model.quantization.base import Quantization
from tightfit.units import cdiv


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockQuantization(Quantization):
    """`quant_method: fp8` with a `weight_block_size`."""

    block_rows: int
    block_columns: int
    ignored: tuple[str, ...]
    """Modules that stay in the model's dtype."""

    def apply(self, weight: Weight) -> Iterator[Weight]:
        """A linear weight as e4m3 with `weight_scale_inv`, float32, one per block."""
        modules = {part.source.removesuffix(".weight") for part in weight.parts}
        skipped = any(
            module == name or module.startswith(f"{name}.")
            for module in modules
            for name in self.ignored
        )
        if not weight.linear or skipped:
            yield weight
            return
        assert weight.columns is not None
        yield replace(weight, dtype="F8_E4M3")
        rows, columns = self.block_rows, self.block_columns
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
