"""Rounding the inputs of linear layers as a scheme says, before they are multiplied.

The scales are those of vLLM's kernels: a token's largest value becomes 127 or 448
(`_custom_ops.py: scaled_int8_quant, scaled_fp8_quant`), and NVFP4's scales of 16 values are e4m3
numbers that the checkpoint's global scale was multiplied into.
"""

import torch
from torch import Tensor

from tightfit.codecs.grids import FP4_MAX, FP8_MAX, to_fp4, to_fp8, to_integers
from tightfit.codecs.mx import from_exponents, to_exponents
from tightfit.errors import UnsupportedModelError
from tightfit.model.quantization.recipe import Inputs
from tightfit.planner.engines.builtin_quantized import ROUNDED_TOKENS

INT8_MAX = 127.0
_LARGEST = {"I8": INT8_MAX, "F8_E4M3": FP8_MAX, "F4_E2M1": FP4_MAX}


class RoundedInputs:
    """Rounds inputs, and gives what the rounded values mean.

    Args:
        inputs: how.
        static: a float32 scale of all inputs, where the checkpoint has one.
        overall: what NVFP4's scales were multiplied by, float32.

    Raises:
        UnsupportedModelError: a kind that is not modelled.
    """

    def __init__(
        self, inputs: Inputs, *, static: Tensor | None = None, overall: Tensor | None = None
    ) -> None:
        if (inputs.dtype == "F4_E2M1") != (overall is not None):
            raise UnsupportedModelError(
                f"inputs of {inputs.dtype} in groups of {inputs.group_size} are not modelled",
                hint="serve this checkpoint with vLLM",
            )
        self._inputs = inputs
        self._largest = _LARGEST[inputs.dtype]
        self._static = static
        self._overall = overall

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, inputs] -> the same, rounded; a few tokens at a time."""
        out = torch.empty_like(x)
        for first in range(0, len(x), ROUNDED_TOKENS):
            rows = x[first : first + ROUNDED_TOKENS]
            values = rows.float()
            if values is rows:
                values = values.clone()
            out[first : first + ROUNDED_TOKENS] = self._round(values)
        return out

    def _round(self, values: Tensor) -> Tensor:
        grouped = values.unflatten(1, (-1, self._inputs.group_size or values.shape[1]))
        scales = self._scales(grouped)
        grouped.div_(scales)
        if self._inputs.dtype == "I8":
            to_integers(values, -128, 127)
        elif self._inputs.dtype == "F8_E4M3":
            to_fp8(values)
        else:
            to_fp4(values)
        grouped.mul_(scales)
        return values

    def _scales(self, grouped: Tensor) -> Tensor:
        if self._static is not None:
            return self._static
        largest = grouped.abs().amax(dim=-1, keepdim=True)
        if self._inputs.exponents:
            return from_exponents(to_exponents(largest, largest=self._largest))
        scales = largest.div_(self._largest)
        if self._overall is not None:
            scales = to_fp8(scales.mul_(self._overall)).div_(self._overall)
        return torch.where(scales > 0, scales, 1.0)


def int8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [tokens, inputs], and the float32 scale of each token, [tokens, 1]."""
    values = x.float()
    scales = values.abs().amax(dim=-1, keepdim=True).div_(INT8_MAX)
    scales = torch.where(scales > 0, scales, 1.0)
    return to_integers(values.div(scales), -128, 127).to(torch.int8), scales
