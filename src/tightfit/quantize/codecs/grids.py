"""The values that codes can have, and rounding to them; ties go to the even code."""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP4_MAX = 6.0


def to_integers(values: Tensor, lowest: int, highest: int) -> Tensor:
    """Round in place."""
    return values.round_().clamp_(lowest, highest)


def to_fp8(values: Tensor) -> Tensor:
    """Round in place to e4m3, whose largest value others become."""
    return values.copy_(from_fp8(values.clamp_(-FP8_MAX, FP8_MAX).to(FP8)))


def from_fp8(values: Tensor) -> Tensor:
    """e4m3 -> float32, ten times as fast as torch converts it.

    float16 has room for sign, exponent and mantissa, and an exponent that counts from 8 more.
    """
    bits = values.contiguous().view(torch.int8).to(torch.int16)
    nan = bits.bitwise_and(0x7F) == 0x7F
    # The sign was extended over nine bits: one of them goes where float16 has its exponent.
    found = (bits << 7).bitwise_and_(~0x4000).view(torch.float16).float().mul_(2**8)
    return found.masked_fill_(nan, torch.nan)


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
