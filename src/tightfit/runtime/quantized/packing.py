"""Quantized weights from a checkpoint's forms to those that kernels read, in as little memory.

4-bit codes are put into the order of `kernels.packed` where they lie, and scales are turned, so
that those of neighbouring outputs are side by side.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tightfit.codecs import Codec
from tightfit.codecs.decoders import AnyFp8Block, AnyInt8, ModelOptFp4
from tightfit.codecs.floats import Fp8Channel, Fp8Tensor, MxFp8
from tightfit.codecs.fp4 import MxFp4, NvFp4
from tightfit.codecs.integers import Awq, Gptq, Integers
from tightfit.codecs.packing import awq_reorder, pack_nibbles, unpack_nibbles, unpack_words
from tightfit.runtime.kernels.packed import Packed
from tightfit.runtime.loading.parameters import QuantizedWeight
from tightfit.runtime.quantized.stored import by_part, row_scales
from tightfit.units import cdiv

_PIECE = 2**19
"""Groups of 32 codes that are rearranged at once."""


def packed(weight: QuantizedWeight, codec: Codec, tensors: Mapping[str, Tensor]) -> Packed | None:
    """A matrix, or those of all experts, as kernels read them; None if none does.

    Args:
        weight: what the tensors stand for.
        codec: of the weight.
        tensors: by kind; those of 4-bit codes are overwritten.
    """
    group = codec.group_size
    if isinstance(codec, AnyInt8):
        group = weight.forms["weight_scale"].columns or 0
    if isinstance(codec, AnyFp8Block) and any(rows % group for rows in weight.part_rows[:-1]):
        return None
    if weight.columns % 32 or (group % 32 and group != 16):
        return None
    columns = weight.columns
    match codec:
        case AnyInt8() | Fp8Tensor() | Fp8Channel():
            values, scale = tensors["weight"], tensors["weight_scale"]
            kind = "int8" if isinstance(codec, AnyInt8) else "fp8"
            if group:
                scales = _turned(scale)
                return Packed(
                    kind=kind, values=values, columns=columns, group_size=group, scales=scales
                )
            rows = _rows(weight, row_scales(weight, scale))
            return Packed(kind=kind, values=_bytes(values), columns=columns, row_scales=rows)
        case AnyFp8Block():
            blocks = sum(cdiv(rows, codec.block) for rows in weight.part_rows)
            scale = tensors[codec.scale_kind]
            lead = (weight.experts,) if weight.experts else ()
            return Packed(
                kind="fp8",
                values=_bytes(tensors["weight"]),
                columns=columns,
                group_size=group,
                scale_rows=group,
                scales=_turned(scale.reshape(*lead, blocks, cdiv(columns, group))),
            )
        case MxFp8():
            return Packed(
                kind="fp8",
                values=_bytes(tensors["weight"]),
                columns=columns,
                group_size=group,
                scale="e8m0",
                scales=_turned(tensors["weight_scale"]),
            )
        case MxFp4():
            return Packed(
                kind="fp4",
                values=_halves(tensors["weight_packed"]),
                columns=columns,
                group_size=group,
                scale="e8m0",
                scales=_turned(tensors["weight_scale"]),
            )
        case NvFp4():
            modelopt = isinstance(codec, ModelOptFp4)
            whole = tensors["weight_scale_2" if modelopt else "weight_global_scale"].float()
            return Packed(
                kind="fp4",
                values=_halves(tensors["weight" if modelopt else "weight_packed"]),
                columns=columns,
                group_size=group,
                scale="e4m3",
                scales=_bytes(_turned(tensors["weight_scale"])),
                row_scales=_rows(weight, by_part(weight, whole if modelopt else 1 / whole)),
            )
        case Integers():
            return _integers(weight, codec, tensors)
    return None


def _rows(weight: QuantizedWeight, scales: Tensor) -> Tensor:
    return scales if weight.experts else scales[0]


def _integers(weight: QuantizedWeight, codec: Integers, tensors: Mapping[str, Tensor]) -> Packed:
    """Of compressed-tensors, GPTQ and AWQ."""
    zeros = None
    if isinstance(codec, Awq):
        values = _in_place(tensors["qweight"], _awq_rows)
        zeros = awq_reorder(unpack_words(tensors["qzeros"], codec.bits))
        scales = tensors["scales"]
    elif isinstance(codec, Gptq):
        values = _in_place(tensors["qweight"], lambda words: words.T.contiguous())
        if "qzeros" in tensors:
            # Stored minus one; what is 0 became the highest code.
            zeros = unpack_words(tensors["qzeros"], codec.bits).add_(1)
            zeros.bitwise_and_(2**codec.bits - 1)
        scales = tensors["scales"]
    else:
        values = tensors["weight_packed"]
        if not codec.symmetric:
            zeros = unpack_words(tensors["weight_zero_point"].mT, codec.bits).contiguous()
        scales = _turned(tensors["weight_scale"])
    values = values.view(torch.uint8)
    return Packed(
        kind=f"int{codec.bits}",
        values=_halves(values) if codec.bits == 4 else values,
        columns=weight.columns,
        group_size=codec.group_size or weight.columns,
        scales=scales,
        zeros=zeros,
    )


def _in_place(words: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A matrix, or each of many, changed to as many words in another shape."""
    matrices = words if words.dim() == 3 else words[None]
    shape: tuple[int, ...] = ()
    for matrix in matrices:
        changed = change(matrix)
        shape = tuple(changed.shape)
        matrix.view(-1).copy_(changed.view(-1))
    return words.view(*words.shape[:-2], *shape)


def _awq_rows(words: Tensor) -> Tensor:
    """Words of eight outputs to words of inputs: [columns, rows / 8] -> [rows, columns / 8]."""
    codes = awq_reorder(unpack_words(words, 4)).T.contiguous()
    return pack_nibbles(codes).view(torch.int32)


def _halves(values: Tensor) -> Tensor:
    """Bytes of neighbouring columns to those of columns j and j + 16 of 32, in place."""
    for piece in values.view(-1, 16).split(_PIECE):
        codes = unpack_nibbles(piece)
        piece.copy_(codes[:, :16] | codes[:, 16:] << 4)
    return values


def _turned(scales: Tensor) -> Tensor:
    """[outputs, groups] -> [groups, outputs]."""
    return scales.mT.contiguous()


def _bytes(values: Tensor) -> Tensor:
    return values if values.dtype == torch.int8 else values.view(torch.uint8)
