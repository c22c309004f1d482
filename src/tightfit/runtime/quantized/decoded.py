"""Quantized linear layers that torch alone executes: on a CPU, and in float32 anywhere.

int8 weights and inputs are multiplied as integers by torch; int4 weights are put into the order of
its kernel for bfloat16 inputs (`int4`); all others are decoded when they are used, some rows at a
time, so that little of a matrix is ever there in floats. Inputs are rounded as the scheme says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import lcm

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.codecs import Codec, Stored
from tightfit.codecs.floats import Fp8Channel, Fp8Tensor
from tightfit.codecs.grids import FP8_UNIT, small_fp8
from tightfit.model.quantization.forms import Form
from tightfit.planner.engines.builtin_quantized import (
    DECODED_ELEMENTS,
    ROUNDED_TOKENS,
    multiplies_integers,
)
from tightfit.runtime.layers import ExpertMatrices, Matrix
from tightfit.runtime.loading.parameters import QuantizedWeight
from tightfit.runtime.quantized.inputs import RoundedInputs, int8_tokens
from tightfit.runtime.quantized.stored import codec, codec_forms, input_scales, row_scales
from tightfit.units import cdiv


def matrix(weight: QuantizedWeight, tensors: Mapping[str, Tensor]) -> Matrix:
    """A matrix, or one of an expert.

    Args:
        weight: what the tensors stand for.
        tensors: by kind.

    Raises:
        UnsupportedModelError: a scheme that is not executed.
    """
    inputs = weight.inputs
    if multiplies_integers(tuple(weight.forms.values()), inputs) and not tensors["weight"].is_cuda:
        return Int8Matrix(tensors["weight"], row_scales(weight, tensors["weight_scale"])[0])
    found = codec(weight)
    rounded = None
    if inputs is not None:
        static, overall = input_scales(inputs, tensors)
        rounded = RoundedInputs(inputs, static=static, overall=overall)
    if isinstance(found, Fp8Tensor | Fp8Channel):
        return Fp8Matrix(tensors["weight"], row_scales(weight, tensors["weight_scale"])[0], rounded)
    values = codec_forms(weight)
    held = {kind: tensor for kind, tensor in tensors.items() if kind in values}
    return DecodedMatrix(found, weight, held, rounded)


class DecodedExperts(ExpertMatrices):
    """Experts whose matrices are decoded, or multiplied by torch's kernels."""

    def __init__(self, weight: QuantizedWeight, tensors: Mapping[str, Tensor]) -> None:
        self._weight = weight
        self._tensors = tensors
        # So that a scheme that is not executed is refused at once.
        self._expert(0)

    def __len__(self) -> int:
        return len(next(iter(self._tensors.values())))

    def _expert(self, index: int) -> Matrix:
        return matrix(self._weight, {kind: t[index] for kind, t in self._tensors.items()})


class DecodedMatrix:
    """Decodes some rows, multiplies with them, and forgets them."""

    def __init__(
        self,
        codec: Codec,
        weight: QuantizedWeight,
        tensors: Mapping[str, Tensor],
        rounded: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.codec = codec
        self.weight = weight
        self.tensors = tensors
        self.rounded = rounded

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        if self.rounded is not None:
            x = self.rounded(x)
        rows = sum(self.weight.part_rows)
        out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
        for first, count, stored in self.pieces(1):
            weight = self.codec.decode(stored).to(x.dtype)
            out[:, first : first + count] = F.linear(x, weight)
        return out if bias is None else out.add_(bias)

    def exact(self) -> Matrix:
        """The same weight, and inputs as they are."""
        return DecodedMatrix(self.codec, self.weight, self.tensors, None)

    def pieces(self, multiple: int) -> Iterator[tuple[int, int, Stored]]:
        """First row, count, and what stands for some rows.

        They never are of two parts, and are as many as a `multiple`, but for the last of a part.
        """
        forms, part_rows = self.weight.forms, self.weight.part_rows
        step = lcm(self.codec.row_step, multiple)
        step *= max(DECODED_ELEMENTS // (self.weight.columns * step), 1)
        first = 0
        for part, rows in enumerate(part_rows):
            for row in range(0, rows, step):
                count = min(step, rows - row)
                yield (
                    first + row,
                    count,
                    {
                        kind: _some(forms[kind], tensor, part_rows, part, row, count)
                        for kind, tensor in self.tensors.items()
                    },
                )
            first += rows


class Fp8Matrix:
    """e4m3 weights [outputs, inputs] with a float32 scale for each output.

    Weights are widened some rows at a time, and outputs are scaled instead of them.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, rounded: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.weight = weight
        self.scale = scale
        self.rounded = rounded

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        if self.rounded is not None:
            x = self.rounded(x)
        rows, columns = self.weight.shape
        out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
        step = max(DECODED_ELEMENTS // columns, 1)
        for first in range(0, rows, step):
            some = slice(first, first + step)
            weight = small_fp8(self.weight[some]).mul_(FP8_UNIT).to(x.dtype)
            out[:, some] = F.linear(x, weight).float().mul_(self.scale[some])
        return out if bias is None else out.add_(bias)

    def exact(self) -> Matrix:
        """The same weight, and inputs as they are."""
        return Fp8Matrix(self.weight, self.scale, None)


class Int8Matrix:
    """int8 weights [outputs, inputs] with a float32 scale for each output, and int8 inputs."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.weight = weight
        self.scale = scale

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs], a few tokens at a time."""
        out = torch.empty(len(x), len(self.weight), dtype=x.dtype, device=x.device)
        for first in range(0, len(x), ROUNDED_TOKENS):
            values, scales = int8_tokens(x[first : first + ROUNDED_TOKENS])
            product = torch._int_mm(values, self.weight.T).float()
            out[first : first + ROUNDED_TOKENS] = product.mul_(scales).mul_(self.scale)
        return out if bias is None else out.add_(bias)

    def exact(self) -> Matrix:
        """Itself: it rounds by the largest value of a token, which stays what it is."""
        return self


def _some(
    form: Form, tensor: Tensor, part_rows: Sequence[int], part: int, row: int, count: int
) -> Tensor:
    """What a tensor of a fused matrix has for some rows of a part."""
    if not form.rows:
        first = 0 if form.shared else part * form.count
        return tensor.reshape(-1)[first : first + form.count]
    first = sum(cdiv(rows, form.rows) for rows in part_rows[:part]) + row // form.rows
    axis = -1 if form.transposed and form.columns is not None else 0
    return tensor.narrow(axis, first, cdiv(count, form.rows))
