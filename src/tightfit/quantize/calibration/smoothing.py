"""Which scales of channels make the quantized layers' outputs most like the original ones.

Both methods raise what is known of activations to a power, and try powers: AWQ (Lin et al. 2023,
arXiv 2306.00978) protects the weights of large inputs, SmoothQuant (Xiao et al. 2022, arXiv
2211.10438) makes activations easier to quantize. Leaving all as it is counts as well.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tightfit.codecs import Codec
from tightfit.model.quantization import recipe
from tightfit.quantize.calibration.inputs import Inputs
from tightfit.quantize.calibration.scales import least_output_error
from tightfit.runtime.quantized.inputs import RoundedInputs

_STEPS = 10
_ROWS = 512
_ALL_ROWS = 4096
"""Rows that are tried, of a matrix and of all that share an input; evenly spread."""
_POWERS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_SHARES = (1.0, 0.9, 0.8, 0.7)
"""Of the largest values of groups, where scales are to be clipped afterwards."""
_SMALLEST = 1e-5

Shape = Callable[[Tensor], Tensor]
"""Makes some channels alike that have to have the same scale."""


def awq_scales(coder: Codec, weights: Sequence[Tensor], inputs: Inputs, alike: Shape) -> Tensor:
    """float32 `[columns]`, by the error of the outputs of rounded weights.

    Args:
        coder: of the scheme.
        weights: float32 `[rows, columns]` each, of all layers that see the input.
        inputs: of them, with a Gram matrix.
        alike: applied to all candidates.
    """
    assert inputs.gram is not None
    gram = inputs.gram
    size = inputs.mean.clamp(min=_SMALLEST)
    own = _column_size(coder, weights).clamp(min=_SMALLEST)
    largest = _largest(weights)
    some = _some_rows(weights, coder.row_step)

    def error(scales: Tensor) -> float:
        amax = (largest * scales).amax() if coder.needs_amax else None
        seen = gram / scales / scales[:, None]
        total = 0.0
        for weight in some:
            scaled = weight * scales
            found = least_output_error(coder, scaled, seen, amax, shares)
            wrong = coder.values(coder.codes(scaled, found), found).div_(scales).sub_(weight)
            total += float((wrong @ gram).mul_(wrong).sum())
        return total

    shares = _SHARES if len(coder.shares) > len(_SHARES) else None
    powers = [step / _STEPS for step in range(1, _STEPS + 1)]
    candidates = [torch.ones_like(size), *(size**power for power in powers)]
    candidates += [size**power / own ** (1 - power) for power in powers]
    return _best(candidates, alike, error)


def smoothquant_scales(
    coder: Codec, weights: Sequence[Tensor], inputs: Inputs, rounded: Shape, alike: Shape
) -> Tensor:
    """float32 `[columns]`, by the error of outputs of rounded weights and inputs.

    Args:
        coder: of the scheme.
        weights: float32 `[rows, columns]` each, of all layers that see the input.
        inputs: of them, with some rows.
        rounded: activations as the scheme rounds them.
        alike: applied to all candidates.
    """
    assert inputs.rows is not None
    rows = inputs.rows
    largest = inputs.largest.clamp(min=_SMALLEST)
    own = _largest(weights).clamp(min=_SMALLEST)
    some = _some_rows(weights, coder.row_step)
    expected = [rows @ weight.T for weight in some]

    def error(scales: Tensor) -> float:
        seen = rounded(rows / scales)
        amax = (own * scales).amax() if coder.needs_amax else None
        total = 0.0
        for weight, outputs in zip(some, expected, strict=True):
            scaled = weight * scales
            found = coder.scales(scaled, amax)
            values = coder.values(coder.codes(scaled, found), found)
            total += float((seen @ values.T).sub_(outputs).square_().sum())
        return total

    candidates = [largest**power / own ** (1 - power) for power in _POWERS]
    candidates.insert(0, torch.ones_like(own))
    return _best(candidates, alike, error)


def rounding_of_inputs(scheme: str) -> Shape:
    """How engines round the inputs of a scheme, for every token anew."""
    if scheme == "int8":
        return RoundedInputs(recipe.Inputs(dtype="I8"))
    return RoundedInputs(
        recipe.Inputs(dtype="F8_E4M3", group_size=128 if scheme == "fp8-block" else 0)
    )


def _best(candidates: Iterable[Tensor], alike: Shape, error: Callable[[Tensor], float]) -> Tensor:
    best: Tensor | None = None
    least = 0.0
    for one in candidates:
        scales = alike(one)
        # Around 1, so that neither side leaves the range of its dtype.
        scales = scales / (scales.amax() * scales.amin()).sqrt()
        found = error(scales)
        if best is None or found < least:
            best, least = scales, found
    assert best is not None
    return best


def _largest(weights: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of each column."""
    return torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)


def _column_size(coder: Codec, weights: Sequence[Tensor]) -> Tensor:
    """The mean of each column, as a share of the largest value of its group."""
    total, rows = torch.zeros(weights[0].shape[1]), 0
    for weight in weights:
        size = weight.abs()
        grouped = coder.grouped(size)
        grouped.div_(grouped.amax(dim=-1, keepdim=True).clamp_(min=1e-12))
        total += size.sum(dim=0)
        rows += len(size)
    return total / rows


def _some_rows(weights: Sequence[Tensor], step: int) -> list[Tensor]:
    most = max(min(_ROWS, _ALL_ROWS // len(weights)) // step, 1) * step
    return [
        weight if len(weight) <= most else weight[torch.linspace(0, len(weight) - 1, most).long()]
        for weight in weights
    ]
