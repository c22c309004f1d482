"""The values that codes can have, and rounding to them; ties go to the even code."""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_UNIT = 2.0**120
FP4_MAX = 6.0


def to_integers(values: Tensor, lowest: int, highest: int) -> Tensor:
    """Round in place."""
    return values.round_().clamp_(lowest, highest)


def to_fp8(values: Tensor) -> Tensor:
    """Round in place to e4m3, whose largest value others become."""
    return values.copy_(from_fp8(values.clamp_(-FP8_MAX, FP8_MAX).to(FP8)))


def from_fp8(values: Tensor) -> Tensor:
    """e4m3 -> float32, many times as fast as torch converts it."""
    values = values.contiguous()
    nan = values.view(torch.uint8).bitwise_and(0x7F) == 0x7F
    return small_fp8(values).float().mul_(FP8_UNIT).masked_fill_(nan, torch.nan)


def small_fp8(values: Tensor) -> Tensor:
    """e4m3 -> bfloat16 of the values / `FP8_UNIT`, exactly; NaN becomes a number.

    bfloat16 has room for sign, exponent and mantissa, and an exponent that counts from 120 more.
    """
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(4)
    # The sign was extended over nine bits: some of them go where bfloat16 has its exponent.
    return bits.bitwise_and_(~0x7800).view(torch.bfloat16)


def to_fp4(values: Tensor) -> Tensor:
    """Round in place to e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    return torch.copysign(fp4_values(fp4_codes(values)), values, out=values)


def fp4_codes(values: Tensor) -> Tensor:
    """The codes 0 to 7 of absolute values, float32.

    e2m1 is three ranges of even steps, and of the three lines that count them the lowest counts.
    """
    size = values.abs()
    fine = (size * 2).round_()
    middle = size.round().add_(2)
    coarse = size.mul_(0.5).round_().add_(4)
    return torch.minimum(fine, middle, out=fine).minimum(coarse).clamp_(max=7)


def fp4_values(codes: Tensor) -> Tensor:
    """The values of codes 0 to 7: the inverse of `fp4_codes`."""
    fine = codes * 0.5
    middle = codes - 2
    coarse = (codes - 4).mul_(2)
    return torch.maximum(fine, middle, out=fine).maximum(coarse)
