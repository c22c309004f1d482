"""Integers: int8 for multiplication with int8 activations, and packed ones for weights alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tightfit.codecs.base import Codec, Scales, Stored, stored_scale
from tightfit.codecs.grids import to_integers
from tightfit.codecs.packing import (
    awq_order,
    awq_reorder,
    pack_words,
    to_bytes,
    unpack_words,
)


class Integers(Codec):
    """Codes from `lowest` to `highest` with a scale for each group, symmetric or with zero points.

    Symmetric scales reach half a step beyond the highest code, as compressed-tensors' do: the two
    ends of the range are then equally wrong.
    """

    def __init__(
        self, bits: int, group_size: int, scale_dtype: torch.dtype, *, symmetric: bool = True
    ) -> None:
        self.bits = bits
        self.group_size = group_size
        self.scale_dtype = scale_dtype
        self.symmetric = symmetric
        self.lowest = -(2 ** (bits - 1)) if symmetric else 0
        self.highest = self.lowest + 2**bits - 1

    def candidate(self, matrix: Tensor, amax: Tensor | None, share: float) -> Scales:
        grouped = self.grouped(matrix)
        steps = 2**self.bits - 1
        if self.symmetric:
            scale = grouped.abs().amax(dim=-1) * (2 * share / steps)
            stored = stored_scale(scale, self.scale_dtype, reach=-self.lowest)
            return Scales(factor=stored.float(), stored=stored)
        low = grouped.amin(dim=-1).clamp_(max=0) * share
        high = grouped.amax(dim=-1).clamp_(min=0) * share
        stored = stored_scale(high / steps - low / steps, self.scale_dtype, reach=steps)
        factor = stored.float()
        zero = to_integers(-low / factor, self.lowest, self.highest)
        return Scales(factor=factor, stored=stored, zero=zero)

    def codes(self, matrix: Tensor, scales: Scales) -> Tensor:
        grouped = self.grouped(matrix).div_(scales.factor[..., None])
        if scales.zero is not None:
            grouped.add_(scales.zero[..., None])
        return to_integers(matrix, self.lowest, self.highest)


class Int8(Integers):
    """A scale for each output, `[rows, 1]`."""

    def __init__(self, scale_dtype: torch.dtype) -> None:
        super().__init__(8, 0, scale_dtype)

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"weight": codes.to(torch.int8), "weight_scale": scales.stored}

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        scale = stored["weight_scale"].view(-1, 1)
        return stored["weight"].float(), Scales(factor=scale.float(), stored=scale)


class Packed(Integers):
    """32-bit words along the inputs: compressed-tensors' `pack-quantized`.

    `weight_packed` `[rows, columns * bits / 32]`, `weight_scale` `[rows, groups]`, zero points in
    words along the outputs `[rows * bits / 32, groups]`, and `weight_shape`.
    """

    def __init__(
        self, bits: int, group_size: int, scale_dtype: torch.dtype, *, symmetric: bool = True
    ) -> None:
        super().__init__(bits, group_size, scale_dtype, symmetric=symmetric)
        self.row_step = 1 if symmetric else 32 // bits

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        found = {
            "weight_packed": pack_words(to_bytes(codes - self.lowest), self.bits),
            "weight_scale": scales.stored,
            "weight_shape": torch.tensor(codes.shape),
        }
        if scales.zero is not None:
            zero = to_bytes(scales.zero.T.contiguous())
            found["weight_zero_point"] = pack_words(zero, self.bits).T.contiguous()
        return found

    @staticmethod
    def joined(pieces: Sequence[Stored]) -> dict[str, Tensor]:
        """With the shape of all of them."""
        shapes = torch.stack([piece["weight_shape"] for piece in pieces])
        shape = torch.stack([shapes[:, 0].sum(), shapes[0, 1]])
        return {**Integers.joined(pieces), "weight_shape": shape}

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        codes = unpack_words(stored["weight_packed"], self.bits).float().add_(self.lowest)
        scale, zero = stored["weight_scale"], None
        if not self.symmetric:
            zero = unpack_words(stored["weight_zero_point"].T, self.bits).T.float()
        return codes, Scales(factor=scale.float(), stored=scale, zero=zero)


class Gptq(Integers):
    """AutoGPTQ's: words along the inputs, everything transposed, zero points stored minus one.

    `qweight` `[columns * bits / 32, rows]`, `qzeros` `[groups, rows * bits / 32]`, `scales`
    `[groups, rows]`, and `g_idx`, the group of each input.
    """

    def __init__(
        self, bits: int, group_size: int, scale_dtype: torch.dtype, *, symmetric: bool = True
    ) -> None:
        super().__init__(bits, group_size, scale_dtype, symmetric=symmetric)
        self.row_step = 32 // bits

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        columns = codes.shape[1]
        group = self.group_size or columns
        zero = scales.zero
        if zero is None:
            zero = torch.full(scales.factor.shape, float(-self.lowest))
        return {
            "qweight": pack_words(to_bytes(codes - self.lowest), self.bits).T.contiguous(),
            # What is 0 becomes the highest code, as a word without a sign would wrap around.
            "qzeros": pack_words(to_bytes((zero.T - 1) % 2**self.bits), self.bits),
            "scales": scales.stored.T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // group,
        }

    @staticmethod
    def joined(pieces: Sequence[Stored]) -> dict[str, Tensor]:
        """Side by side, but for the groups of the inputs, which all have."""
        found = _side_by_side(pieces)
        return {**found, "g_idx": pieces[0]["g_idx"]}

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        codes = unpack_words(stored["qweight"].T, self.bits).float().add_(self.lowest)
        scale = stored["scales"].T
        zero = (unpack_words(stored["qzeros"], self.bits).T.float() + 1) % 2**self.bits
        zero += self.lowest
        return codes, Scales(factor=scale.float(), stored=scale, zero=zero)


class Awq(Integers):
    """AutoAWQ's `gemm`: words of eight outputs in its own order, everything transposed.

    `qweight` `[columns, rows / 8]`, `qzeros` `[groups, rows / 8]`, `scales` `[groups, rows]`.
    """

    row_step = 8

    def __init__(self, group_size: int, scale_dtype: torch.dtype) -> None:
        super().__init__(4, group_size, scale_dtype, symmetric=False)

    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        assert scales.zero is not None
        return {
            "qweight": pack_words(awq_order(to_bytes(codes.T)), self.bits),
            "qzeros": pack_words(awq_order(to_bytes(scales.zero.T)), self.bits),
            "scales": scales.stored.T.contiguous(),
        }

    @staticmethod
    def joined(pieces: Sequence[Stored]) -> dict[str, Tensor]:
        """Side by side."""
        return _side_by_side(pieces)

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        codes = awq_reorder(unpack_words(stored["qweight"], self.bits)).T.float()
        zero = awq_reorder(unpack_words(stored["qzeros"], self.bits)).T.float()
        scale = stored["scales"].T
        return codes.contiguous(), Scales(factor=scale.float(), stored=scale, zero=zero)


def _side_by_side(pieces: Sequence[Stored]) -> dict[str, Tensor]:
    return {kind: torch.cat([piece[kind] for piece in pieces], dim=-1) for kind in pieces[0]}
