"""Quantized linear layers and experts on GPUs; see `kernels.matmul`.

Inputs of 8 bits are multiplied with weights of 8 bits as they are, where one scale for each token
and one for each output remain to be applied. Everything else is unpacked in registers to 16 bits,
after what its scheme's rounding does to the inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tightfit.model.quantization.recipe import Inputs
from tightfit.planner.engines.builtin_quantized import CUDA_DECODED_TOKENS
from tightfit.runtime.kernels.packed import Packed
from tightfit.runtime.layers import ExpertMatrices, Matrix
from tightfit.runtime.loading.parameters import QuantizedWeight
from tightfit.runtime.quantized.packing import packed
from tightfit.runtime.quantized.stored import codec, input_scales


def packed_matrices(
    weight: QuantizedWeight, tensors: Mapping[str, Tensor]
) -> Sequence[Matrix] | None:
    """A matrix, or those of all experts, for the kernels; None if they do not take it.

    Args:
        weight: what the tensors stand for.
        tensors: by kind, on a GPU; they may be overwritten.

    Raises:
        UnsupportedModelError: a scheme that is not executed.
    """
    from tightfit.runtime.kernels.matmul import counters

    found = packed(weight, codec(weight), tensors)
    if found is None:
        return None
    # Before a CUDA graph could be the first to need them.
    counters(found.values.device)
    inputs, rounding = weight.inputs, None
    if inputs is not None and not (inputs.dtype == "F8_E4M3" and _weight_only(found.values.device)):
        static, overall = input_scales(inputs, tensors, weight.experts or 1)
        rounding = Rounding(inputs, static=static, overall=overall)
    codes = inputs is not None and rounding is not None and _multiplies_codes(found, inputs)
    if weight.experts:
        return PackedExperts(found, rounding, codes=codes)
    return [_matrix(found, rounding, codes=codes)]


class Rounding:
    """What a scheme does to inputs.

    Args:
        inputs: how they are rounded.
        static: a float32 scale of all inputs, [1], where the checkpoint has one.
        overall: what NVFP4's scales were multiplied by, float32 [1].
    """

    def __init__(
        self, inputs: Inputs, *, static: Tensor | None = None, overall: Tensor | None = None
    ) -> None:
        self._inputs = inputs
        self._static = static
        self._overall = overall

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, inputs] in 8 bits, and float32 scales, [tokens, 1]."""
        from tightfit.runtime.kernels.rounding import rounded_codes

        return rounded_codes(x.contiguous(), self._inputs.dtype, self._static)

    def values(self, x: Tensor) -> Tensor:
        """What the rounded values mean, [tokens, inputs]."""
        from tightfit.runtime.kernels.rounding import rounded

        inputs = self._inputs
        return rounded(
            x.contiguous(),
            inputs.dtype,
            group_size=inputs.group_size,
            exponents=inputs.exponents,
            static=self._static,
            overall=self._overall,
        )


def _multiplies_codes(weight: Packed, inputs: Inputs) -> bool:
    """Whether inputs are multiplied with a weight in 8 bits."""
    if weight.group_size or inputs.group_size:
        return False
    if inputs.dtype == "I8":
        return weight.kind == "int8" and weight.values.dtype == torch.int8
    return inputs.dtype == "F8_E4M3" and weight.kind == "fp8"


def _weight_only(device: torch.device) -> bool:
    """Whether a GPU knows no fp8, so that weights alone are in fp8, as in vLLM."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)


class PackedMatrix:
    """A matrix that is unpacked in registers or, for many tokens, some rows at a time."""

    def __init__(self, weight: Packed, rounding: Rounding | None) -> None:
        self.weight = weight
        self.rounding = rounding

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        from tightfit.runtime.kernels.matmul import decoded_matmul, matmul

        x = x.contiguous() if self.rounding is None else self.rounding.values(x)
        several = decoded_matmul if len(x) > CUDA_DECODED_TOKENS else matmul
        return several(x, self.weight, bias)

    def exact(self) -> Matrix:
        """The same weight, and inputs as they are."""
        return PackedMatrix(self.weight, None)


class CodesMatrix:
    """A matrix of 8 bits, and inputs that are rounded to 8 bits."""

    def __init__(self, weight: Packed, rounding: Rounding) -> None:
        self.weight = weight
        self.rounding = rounding
        self.by_torch = _torch_multiplies(weight)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        from tightfit.runtime.kernels.matmul import matmul

        codes, scales = self.rounding.codes(x)
        weight = self.weight
        if len(x) <= _FEW_TOKENS or not self.by_torch or x.dtype != torch.bfloat16:
            return matmul(codes, weight, bias, x_scales=scales, dtype=x.dtype)
        assert weight.row_scales is not None
        return torch._scaled_mm(
            codes,
            weight.values.view(codes.dtype).T,
            scale_a=scales,
            scale_b=weight.row_scales[None],
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )

    def exact(self) -> Matrix:
        """The same weight, and inputs as they are."""
        return PackedMatrix(self.weight, None)


_FEW_TOKENS = 32


def _torch_multiplies(weight: Packed) -> bool:
    """Whether torch does, with a scale for each row and column; what it gives is bfloat16."""
    fits = weight.outputs % 16 == 0 and weight.columns % 16 == 0
    return weight.kind == "fp8" and fits and _scales_rows(weight.values.device)


@lru_cache(maxsize=8)
def _scales_rows(device: torch.device) -> bool:
    """Whether this torch scales rows and columns on this GPU: tried once."""
    x = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(
            x,
            x.T,
            scale_a=scale,
            scale_b=scale.T,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    except (RuntimeError, ValueError):
        return False
    return True


class PackedExperts(ExpertMatrices):
    """The matrices of all experts of a layer; `kernels.experts` takes them all at once."""

    def __init__(self, weight: Packed, rounding: Rounding | None, *, codes: bool = False) -> None:
        self.weight = weight
        self.rounding = rounding
        self.codes = codes

    def __len__(self) -> int:
        return len(self.weight.values)

    def _expert(self, index: int) -> Matrix:
        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        whole = self.weight
        weight = replace(
            whole,
            values=whole.values[index],
            scales=of(whole.scales),
            zeros=of(whole.zeros),
            row_scales=of(whole.row_scales),
        )
        return _matrix(weight, self.rounding, codes=self.codes)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inputs as the kernel takes them: perhaps in 8 bits, with scales."""
        if self.rounding is None:
            return x.contiguous(), None
        return self.rounding.codes(x) if self.codes else (self.rounding.values(x), None)


def _matrix(weight: Packed, rounding: Rounding | None, *, codes: bool) -> Matrix:
    """How a weight is multiplied; `codes` says that inputs are multiplied in 8 bits."""
    if codes:
        assert rounding is not None
        return CodesMatrix(weight, rounding)
    return PackedMatrix(weight, rounding)
