"""Quantized weights as kernels read them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A matrix [outputs, columns], or one for each expert, which all tensors then have first."""

    kind: str
    """`int4`, `int8` (as uint8, codes are 128 larger), `fp8` (e4m3), `fp4` (e2m1), or `plain`."""
    values: Tensor
    """[outputs, columns], of 4 bits uint8 [outputs, columns / 2]: byte j of 16 has columns j and
    j + 16 of 32, the first in its lower half."""
    columns: int
    group_size: int = 0
    """Inputs that share one of `scales`; 0 if there are none."""
    scale_rows: int = 1
    """Outputs that share one."""
    scale: str = "floats"
    """What `scales` are: `floats`, or uint8 `e4m3` or `e8m0`."""
    scales: Tensor | None = None
    """[groups, outputs / scale_rows]."""
    zeros: Tensor | None = None
    """The codes that mean 0, uint8 like `scales`."""
    row_scales: Tensor | None = None
    """float32 [outputs], what results are multiplied by."""

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return self.values.shape[-2]

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.kind in ("int4", "fp4") else 8 * self.values.itemsize

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, scales and zeros; values again in place of what there is not."""
        values = self.values
        return (
            values,
            values if self.scales is None else self.scales,
            values if self.zeros is None else self.zeros,
        )
