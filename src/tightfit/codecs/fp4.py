"""fp4 e2m1, two codes to a byte, the even column in the lower bits; bit 3 is the sign."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tightfit.codecs.base import Codec, Scales, Stored
from tightfit.codecs.grids import (
    FP4_MAX,
    FP8,
    FP8_MAX,
    fp4_codes,
    fp4_values,
    from_fp8,
    to_fp4,
    to_fp8,
)
from tightfit.codecs.mx import from_exponents, to_exponents
from tightfit.codecs.packing import pack_nibbles, to_bytes, unpack_nibbles


class _Fp4(Codec):
    def codes(self, matrix: Tensor, scales: Scales) -> Tensor:
        return to_fp4(self.scaled(matrix, scales))

    def scaled(self, matrix: Tensor, scales: Scales) -> Tensor:
        self.grouped(matrix).div_(scales.factor[..., None])
        return matrix

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        signs = torch.signbit(codes).view(torch.uint8) << 3
        packed = pack_nibbles(to_bytes(fp4_codes(codes)).bitwise_or_(signs))
        return {"weight_packed": packed, "weight_scale": scales.stored}

    def _unpack(self, stored: Stored) -> Tensor:
        codes = unpack_nibbles(stored["weight_packed"])
        values = fp4_values((codes & 7).float())
        return torch.where(codes > 7, -values, values)


class NvFp4(_Fp4):
    """An e4m3 scale for 16 inputs, and one float32 that those are divided by, which has to be the
    same for all that an engine fuses.

    (NVIDIA's NVFP4; compressed-tensors' `nvfp4-pack-quantized`.)
    """

    group_size = 16
    needs_amax = True

    def candidate(self, matrix: Tensor, amax: Tensor | None, share: float) -> Scales:
        assert amax is not None
        overall = torch.where(amax > 0, FP8_MAX * FP4_MAX / amax, 1.0).view(1)
        # Its square is still finite for weights that are all but zero.
        overall = overall.clamp(max=torch.finfo(torch.float32).max ** 0.5)
        # Halves first: torch is slow at finding the largest of few.
        halves = self.grouped(matrix).abs().unflatten(-1, (2, 8)).unbind(-2)
        scale = torch.maximum(*halves).amax(dim=-1) * (share / FP4_MAX)
        stored = to_fp8(scale * overall)
        stored = torch.where(stored > 0, stored, _SMALLEST_FP8)
        return Scales(factor=stored / overall, stored=stored.to(FP8), overall=overall)

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        assert scales.overall is not None
        return {**super().pack(codes, scales), "weight_global_scale": scales.overall}

    @staticmethod
    def joined(pieces: Sequence[Stored]) -> dict[str, Tensor]:
        """All are divided by the same."""
        return {**_Fp4.joined(pieces), "weight_global_scale": pieces[0]["weight_global_scale"]}

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        scale, overall = stored["weight_scale"], stored["weight_global_scale"]
        factor = from_fp8(scale) / overall
        return self._unpack(stored), Scales(factor=factor, stored=scale, overall=overall)


_SMALLEST_FP8 = 2.0**-9


class MxFp4(_Fp4):
    """A power of two for 32 inputs, `[rows, columns / 32]`.

    (OCP Microscaling Formats 1.0; compressed-tensors' `mxfp4-pack-quantized`.)
    """

    group_size = 32
    shares = (1.0, 0.5, 2.0)

    def candidate(self, matrix: Tensor, amax: Tensor | None, share: float) -> Scales:
        stored = to_exponents(self.grouped(matrix).abs().amax(dim=-1) * share, largest=FP4_MAX)
        return Scales(factor=from_exponents(stored), stored=stored)

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        scale = stored["weight_scale"]
        return self._unpack(stored), Scales(factor=from_exponents(scale), stored=scale)
