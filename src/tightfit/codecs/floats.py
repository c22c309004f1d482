"""fp8 e4m3 with a scale for a matrix, an output, a block, or (MXFP8) for 32 inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.codecs.base import Codec, Scales, Stored, stored_scale
from tightfit.codecs.grids import FP8, FP8_MAX, from_fp8, to_fp8
from tightfit.codecs.mx import from_exponents, to_exponents


class _Fp8(Codec):
    scale_kind = "weight_scale"

    def __init__(self, scale_dtype: torch.dtype) -> None:
        self.scale_dtype = scale_dtype

    def codes(self, matrix: Tensor, scales: Scales) -> Tensor:
        return to_fp8(self.scaled(matrix, scales))

    def scaled(self, matrix: Tensor, scales: Scales) -> Tensor:
        self.grouped(matrix).div_(scales.factor[..., None])
        return matrix.clamp_(-FP8_MAX, FP8_MAX)

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"weight": codes.to(FP8), self.scale_kind: scales.stored}


class Fp8Tensor(_Fp8):
    """One scale, `[1]`, which is not searched for: it belongs to more than some rows."""

    needs_amax = True
    shares = (1.0,)

    def candidate(self, matrix: Tensor, amax: Tensor | None, share: float) -> Scales:
        assert amax is not None
        scale = stored_scale(amax.view(1) * (share / FP8_MAX), self.scale_dtype, reach=FP8_MAX)
        return Scales(factor=scale.float().view(1, 1), stored=scale)

    @staticmethod
    def joined(pieces: Sequence[Stored]) -> dict[str, Tensor]:
        """All have the same scale."""
        return {**_Fp8.joined(pieces), "weight_scale": pieces[0]["weight_scale"]}

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        scale = stored[self.scale_kind]
        factor = scale.float().view(1, 1)
        return from_fp8(stored["weight"]), Scales(factor=factor, stored=scale)


class Fp8Channel(_Fp8):
    """A scale for each output, `[rows, 1]`."""

    def candidate(self, matrix: Tensor, amax: Tensor | None, share: float) -> Scales:
        largest = matrix.abs().amax(dim=1, keepdim=True)
        scale = stored_scale(largest * (share / FP8_MAX), self.scale_dtype, reach=FP8_MAX)
        return Scales(factor=scale.float(), stored=scale)

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        scale = stored[self.scale_kind].view(-1, 1)
        return from_fp8(stored["weight"]), Scales(factor=scale.float(), stored=scale)


class Fp8Block(_Fp8):
    """A scale for each block of 128 x 128, `[row blocks, column blocks]`; the last may be smaller.

    DeepSeek calls it `weight_scale_inv`, and multiplies by it as well (DeepSeek-V3's
    `inference/kernel.py: weight_dequant`).
    """

    def __init__(
        self, scale_dtype: torch.dtype, *, block: int = 128, kind: str = "weight_scale"
    ) -> None:
        super().__init__(scale_dtype)
        self.block = self.row_step = self.group_size = block
        self.scale_kind = kind

    def candidate(self, matrix: Tensor, amax: Tensor | None, share: float) -> Scales:
        largest = self._blocks(matrix.abs()).amax(dim=(1, 3))
        scale = stored_scale(largest * (share / FP8_MAX), self.scale_dtype, reach=FP8_MAX)
        return Scales(factor=scale.float(), stored=scale)

    def scaled(self, matrix: Tensor, scales: Scales) -> Tensor:
        return matrix.div_(self._spread(scales.factor, matrix)).clamp_(-FP8_MAX, FP8_MAX)

    def values(self, codes: Tensor, scales: Scales) -> Tensor:
        return codes * self._spread(scales.factor, codes)

    def errors(self, matrix: Tensor, scales: Scales) -> Tensor:
        values = self.values(self.codes(matrix.clone(), scales), scales)
        return self._blocks(values.sub_(matrix).square_()).sum(dim=(1, 3))

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        scale = stored[self.scale_kind]
        return from_fp8(stored["weight"]), Scales(factor=scale.float(), stored=scale)

    def _blocks(self, matrix: Tensor) -> Tensor:
        """`[row blocks, block, column blocks, block]`, filled up with zeros."""
        rows, columns = (-size % self.block for size in matrix.shape)
        if rows or columns:
            matrix = F.pad(matrix, (0, columns, 0, rows))
        return matrix.unflatten(1, (-1, self.block)).unflatten(0, (-1, self.block))

    def _spread(self, factor: Tensor, matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        wide = factor.repeat_interleave(self.block, dim=1)[:, :columns]
        return wide.repeat_interleave(self.block, dim=0)[:rows]


class MxFp8(_Fp8):
    """A power of two for 32 inputs, stored as its exponent + 127, `[rows, columns / 32]`.

    (OCP Microscaling Formats 1.0; compressed-tensors' `mxfp8-quantized`.)
    """

    group_size = 32
    shares = (1.0, 0.5)

    def __init__(self) -> None:
        super().__init__(torch.uint8)

    def candidate(self, matrix: Tensor, amax: Tensor | None, share: float) -> Scales:
        stored = to_exponents(self.grouped(matrix).abs().amax(dim=-1) * share, largest=FP8_MAX)
        return Scales(factor=from_exponents(stored), stored=stored)

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        scale = stored["weight_scale"]
        return from_fp8(stored["weight"]), Scales(factor=from_exponents(scale), stored=scale)
