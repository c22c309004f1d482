"""Which codec decodes what a quantized checkpoint of any known origin holds of a matrix.

Beyond what `quantize` writes these are static activations, whose scales say nothing of the weights,
ModelOpt's names, and integers with any number of scales.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tightfit.checkpoint.header import TensorInfo
from tightfit.codecs import Codec, Scales, Stored
from tightfit.codecs.floats import Fp8Block, Fp8Channel, Fp8Tensor, MxFp8
from tightfit.codecs.fp4 import MxFp4, NvFp4
from tightfit.codecs.grids import from_fp8
from tightfit.codecs.integers import Awq, Gptq, Int8, Packed
from tightfit.model.quantization.forms import Form, Forms
from tightfit.units import cdiv

VALUES = ("weight", "weight_packed", "qweight")
"""Kinds of tensors that hold the codes of a matrix."""
_BESIDE = ("input_", "weight_shape")
"""Kinds that no weight depends on."""
_DTYPE = torch.bfloat16
"""Of scales that are written: nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix:
    """`[rows, columns]` of a quantized checkpoint, by the kinds of tensors that its codec reads."""

    codec: Codec
    rows: int
    columns: int
    tensors: Mapping[str, TensorInfo]


def stored_matrix(choices: Iterable[Forms], held: Mapping[str, TensorInfo]) -> StoredMatrix | None:
    """The matrix that tensors stand for, by the first forms that they are of; None if by none.

    Args:
        choices: forms, as the checkpoint's config has them.
        held: what the checkpoint holds of a module, by kind.
    """
    for forms in choices:
        needed = {
            form.kind: form
            for form in forms
            if form.stored and not form.optional and not form.kind.startswith(_BESIDE)
        }
        if needed.keys() <= held.keys() and (found := codec_of(needed)) is not None:
            tensors = {kind: held[kind] for kind in (*needed, "g_idx") if kind in held}
            values = next(held[kind] for kind in VALUES if kind in needed)
            shape = _shape(found, values.shape)
            if shape is not None and _fits(found, shape, tensors):
                rows, columns = shape
                return StoredMatrix(codec=found, rows=rows, columns=columns, tensors=tensors)
    return None


def codec_of(forms: Mapping[str, Form]) -> Codec | None:
    """The codec of forms by kind; None if there is none."""
    if (packed := forms.get("qweight")) is not None:
        return _transposed(packed, forms)
    scale = forms.get("weight_scale") or forms.get("weight_scale_inv")
    values = forms.get("weight_packed") or forms.get("weight")
    if scale is None or values is None:
        return None
    group = scale.columns or 0
    match values.kind, values.dtype:
        case "weight_packed", "I32" if values.columns in (4, 8):
            symmetric = "weight_zero_point" not in forms
            return Packed(32 // values.columns, group, _DTYPE, symmetric=symmetric)
        case "weight_packed", "U8":
            return NvFp4() if group == 16 else MxFp4()
        case "weight", "U8" if "weight_scale_2" in forms:
            return ModelOptFp4()
        case "weight", "I8":
            return AnyInt8(_DTYPE)
        case "weight", "F8_E4M3":
            return _fp8(scale)
    return None


def _transposed(packed: Form, forms: Mapping[str, Form]) -> Codec | None:
    group = forms["scales"].columns or 0
    if packed.rows > 1:
        return Awq(group, _DTYPE) if packed.rows == 8 and "qzeros" in forms else None
    if packed.columns not in (4, 8):
        return None
    return Gptq(32 // packed.columns, group, _DTYPE)


def _fp8(scale: Form) -> Codec | None:
    if scale.ragged:
        same = scale.rows == scale.columns
        return AnyFp8Block(_DTYPE, block=scale.rows, kind=scale.kind) if same else None
    if scale.columns is None:
        return Fp8Tensor(_DTYPE)
    return MxFp8() if scale.columns else Fp8Channel(_DTYPE)


def _shape(codec: Codec, stored: tuple[int, ...]) -> tuple[int, int] | None:
    if len(stored) != 2:
        return None
    rows, columns = stored
    match codec:
        case Packed():
            return rows, columns * 32 // codec.bits
        case Gptq():
            return columns, rows * 32 // codec.bits
        case Awq():
            return columns * 8, rows
        case NvFp4() | MxFp4():
            return rows, columns * 2
    return rows, columns


def _fits(codec: Codec, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether there are as many scales as the codec will read."""
    rows, columns = shape
    kind = next(kind for kind in ("scales", "weight_scale", "weight_scale_inv") if kind in tensors)
    count = prod(tensors[kind].shape)
    match codec:
        case AnyInt8():
            return count == 1 or (count % rows == 0 and columns % (count // rows) == 0)
        case Fp8Tensor():
            return count == 1
        case Fp8Block():
            return count == cdiv(rows, codec.block) * cdiv(columns, codec.block)
    groups = columns // codec.group_size if codec.group_size else 1
    return count == rows * groups and (not codec.group_size or columns % codec.group_size == 0)


class AnyInt8(Int8):
    """One scale, one for each output, or one for each group of inputs."""

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        """Codes and scales of what a checkpoint holds."""
        codes, scale = stored["weight"].float(), stored["weight_scale"]
        rows = 1 if scale.numel() == 1 else len(codes)
        return codes, Scales(factor=scale.float().view(rows, -1), stored=scale)

    def values(self, codes: Tensor, scales: Scales) -> Tensor:
        """What codes mean, float32 `[rows, columns]`."""
        grouped = codes.unflatten(1, (scales.factor.shape[1], -1))
        return (grouped * scales.factor[..., None]).flatten(1)


class AnyFp8Block(Fp8Block):
    """Scales that may have further dimensions of 1: ModelOpt's."""

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        """Codes and scales of what a checkpoint holds."""
        scale = stored[self.scale_kind]
        rows, columns = (cdiv(size, self.block) for size in stored["weight"].shape)
        return super().unpack({**stored, self.scale_kind: scale.reshape(rows, columns)})


class ModelOptFp4(NvFp4):
    """NVFP4 with ModelOpt's names; scales are multiplied by the one of the whole matrix."""

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        """Codes and scales of what a checkpoint holds."""
        scale = stored["weight_scale"]
        factor = from_fp8(scale) * stored["weight_scale_2"]
        codes = self._unpack({"weight_packed": stored["weight"]})
        return codes, Scales(factor=factor, stored=scale)
