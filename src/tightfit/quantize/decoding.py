"""Matrices of a quantized checkpoint, decoded some rows at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tightfit.checkpoint.header import TensorInfo
from tightfit.checkpoint.source import Source
from tightfit.codecs import Codec, Stored
from tightfit.codecs.fp4 import MxFp4, NvFp4
from tightfit.codecs.grids import FP4_MAX, FP8_MAX
from tightfit.codecs.integers import Awq, Gptq, Integers
from tightfit.quantize.computed_source import read_exactly
from tightfit.runtime.loading.files import TORCH_DTYPES
from tightfit.units import cdiv

_DTYPES = {**TORCH_DTYPES, "F8_E8M0": torch.uint8, "U32": torch.int32}
"""Of stored tensors: some writers have other names for the same bits."""


def read_stored(tensors: Mapping[str, TensorInfo], source: Source) -> dict[str, Tensor]:
    """What a checkpoint holds of a matrix, by kind.

    Raises:
        CheckpointError: a file ends early.
    """
    return {kind: _read(info, source) for kind, info in tensors.items()}


def some_rows(codec: Codec, stored: Stored, rows: int, first: int, count: int) -> Stored:
    """What stands for some rows of a matrix of `rows`: views.

    `first` is a multiple of the codec's `row_step`, and so is `count` but for the last ones.
    """
    axis = -1 if isinstance(codec, Awq | Gptq) else 0
    step = codec.row_step

    def of(tensor: Tensor) -> Tensor:
        size = tensor.shape[axis] if tensor.dim() else 0
        if size == rows:
            return tensor.narrow(axis, first, count)
        if size == cdiv(rows, step) and tensor.dim() > 1:
            return tensor.narrow(axis, first // step, cdiv(count, step))
        return tensor

    return {kind: of(tensor) for kind, tensor in stored.items()}


def reach(codec: Codec) -> tuple[float, float]:
    """The least and the largest value, in codes, that the ends of the grid are nearest to.

    A little more than that, so that nothing is beyond it because its scale was rounded to bfloat16.
    """
    if isinstance(codec, Integers):
        low, high = codec.lowest - 0.5, codec.highest + 0.5
    else:
        # Half of the step that leads to the largest value.
        high = FP4_MAX + 1 if isinstance(codec, NvFp4 | MxFp4) else FP8_MAX + 16
        low = -high
    return low - abs(low) * _ROUNDING, high + abs(high) * _ROUNDING


_ROUNDING = 2.0**-8


def _read(info: TensorInfo, source: Source) -> Tensor:
    data = read_exactly(source, info.file, info.offset, info.offset + info.nbytes)
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[info.dtype]).view(info.shape)
