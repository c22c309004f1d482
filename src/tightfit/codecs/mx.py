"""Scales that are powers of two, stored as bytes: the exponent + 127 (OCP's E8M0)."""

import torch
from torch import Tensor

_BIAS = 127
_NAN = 255


def to_exponents(amax: Tensor, *, largest: float) -> Tensor:
    """uint8 exponents with which a grid that ends at `largest` reaches to about `amax`.

    A largest value of up to 7/4 of a power of two stays below the next one, as in
    compressed-tensors' `mxfp_utils.py`: it is then 7 on the scale of e2m1, which clips it to 6, and
    448 on that of e4m3.
    """
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - 1 + (mantissa >= 0.875).int()
    top = torch.frexp(torch.tensor(largest))[1] - 1
    stored = torch.where(amax > 0, exponent - top, 0).add_(_BIAS).clamp_(1, 254)
    return stored.masked_fill_(~torch.isfinite(amax), _NAN).to(torch.uint8)


def from_exponents(stored: Tensor) -> Tensor:
    """float32 powers of two: the byte is where float32 has its exponent."""
    return (stored.int() << 23).view(torch.float32)
