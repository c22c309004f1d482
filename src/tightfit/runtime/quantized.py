"""Linear layers whose weights stay as small in memory as in the checkpoint.

Three kinds: int8 weights and inputs are multiplied as integers by torch; int4 weights are put into
the order of its kernel for bfloat16 inputs; all others are decoded when they are used, some rows at
a time, so that little of a matrix is ever there in floats. Inputs are rounded as the scheme says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import lcm
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.codecs import Codec, Scales, Stored
from tightfit.codecs.decoders import codec_of
from tightfit.codecs.floats import Fp8Channel, Fp8Tensor
from tightfit.codecs.grids import FP8_UNIT, small_fp8
from tightfit.codecs.integers import Gptq, Integers
from tightfit.codecs.packing import unpack_words
from tightfit.errors import UnsupportedModelError
from tightfit.model.quantization.forms import Form
from tightfit.planner.engines.builtin_quantized import (
    DECODED_ELEMENTS,
    ROUNDED_TOKENS,
    int4_group,
    multiplies_integers,
)
from tightfit.runtime.files import forget
from tightfit.runtime.inputs import RoundedInputs, int8_tokens
from tightfit.runtime.layers import Matrix, Weights
from tightfit.runtime.parameters import QuantizedWeight, RankParameters
from tightfit.units import cdiv


def rank_weights(
    parameters: RankParameters, tensors: dict[str, Tensor], *, repack: bool = False
) -> Weights:
    """The weights of a rank.

    Args:
        parameters: of the rank.
        tensors: by the names of parameters; those that are repacked take the place of others.
        repack: for bfloat16 on a CPU: put int4 weights into the order of torch's kernel.

    Raises:
        UnsupportedModelError: a scheme that is not executed.
    """
    matrices: dict[str, Sequence[Matrix]] = {}
    for weight in parameters.quantized:
        group = None
        if repack and _has_int4_kernel():
            group = int4_group(tuple(weight.forms.values()), weight.inputs, weight.part_rows)
        mine = {kind: tensors[name] for kind, name in weight.tensors.items()}
        if group is None:
            several = weight.experts > 0
            matrices[weight.name] = Experts(weight, mine) if several else [_matrix(weight, mine)]
            continue
        packed, scales = _repacked(weight, mine, group)
        for kind, name in weight.tensors.items():
            if not kind.startswith(_BESIDE):
                forget(mine.pop(kind))
                del tensors[name]
        tensors[f"{weight.name} packed"], tensors[f"{weight.name} scales"] = packed, scales
        matrices[weight.name] = [
            Int4Matrix(*one, group) for one in zip(packed, scales, strict=True)
        ]
    return Weights(tensors=tensors, matrices=matrices)


class Experts(Sequence[Matrix]):
    """The matrices of experts, of which each is put together when it is used: they are many."""

    def __init__(self, weight: QuantizedWeight, tensors: Mapping[str, Tensor]) -> None:
        self._weight = weight
        self._tensors = tensors
        # So that a scheme that is not executed is refused at once.
        self._expert(0)

    def __len__(self) -> int:
        return len(next(iter(self._tensors.values())))

    @overload
    def __getitem__(self, index: int) -> Matrix: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Matrix]: ...

    def __getitem__(self, index: int | slice) -> Matrix | Sequence[Matrix]:
        if isinstance(index, slice):
            return [self._expert(i) for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._expert(index)

    def _expert(self, index: int) -> Matrix:
        return _matrix(self._weight, {kind: t[index] for kind, t in self._tensors.items()})


class DecodedMatrix:
    """Decodes some rows, multiplies with them, and forgets them."""

    def __init__(
        self,
        codec: Codec,
        weight: QuantizedWeight,
        tensors: Mapping[str, Tensor],
        rounded: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.codec = codec
        self.weight = weight
        self.tensors = tensors
        self.rounded = rounded

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        if self.rounded is not None:
            x = self.rounded(x)
        rows = sum(self.weight.part_rows)
        out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
        for first, count, stored in self.pieces(1):
            weight = self.codec.decode(stored).to(x.dtype)
            out[:, first : first + count] = F.linear(x, weight)
        return out if bias is None else out.add_(bias)

    def pieces(self, multiple: int) -> Iterator[tuple[int, int, Stored]]:
        """First row, count, and what stands for some rows.

        They never are of two parts, and are as many as a `multiple`, but for the last of a part.
        """
        forms, part_rows = self.weight.forms, self.weight.part_rows
        step = lcm(self.codec.row_step, multiple)
        step *= max(DECODED_ELEMENTS // (self.weight.columns * step), 1)
        first = 0
        for part, rows in enumerate(part_rows):
            for row in range(0, rows, step):
                count = min(step, rows - row)
                yield (
                    first + row,
                    count,
                    {
                        kind: _some(forms[kind], tensor, part_rows, part, row, count)
                        for kind, tensor in self.tensors.items()
                    },
                )
            first += rows


def executions(weights: Weights) -> dict[str, int]:
    """How quantized layers are executed, and how many are so; experts of a layer count once."""
    found: dict[str, int] = {}
    for matrices in weights.matrices.values():
        how = _EXECUTED[type(matrices[0])]
        found[how] = found.get(how, 0) + 1
    return found


class Int4Matrix:
    """int4 weights in the order of torch's kernel, with a scale and a zero point for each group.

    `packed` is uint8 [outputs, inputs / 2], and `scales` bfloat16 [groups, outputs, 2].
    """

    def __init__(self, packed: Tensor, scales: Tensor, group_size: int) -> None:
        self.packed = packed
        self.scales = scales
        self.group_size = group_size

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, self.group_size, self.scales
        )
        return out if bias is None else out.add_(bias)


class Fp8Matrix:
    """e4m3 weights [outputs, inputs] with a float32 scale for each output.

    Weights are widened some rows at a time, and outputs are scaled instead of them.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, rounded: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.weight = weight
        self.scale = scale
        self.rounded = rounded

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        if self.rounded is not None:
            x = self.rounded(x)
        rows, columns = self.weight.shape
        out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
        step = max(DECODED_ELEMENTS // columns, 1)
        for first in range(0, rows, step):
            some = slice(first, first + step)
            weight = small_fp8(self.weight[some]).mul_(FP8_UNIT).to(x.dtype)
            out[:, some] = F.linear(x, weight).float().mul_(self.scale[some])
        return out if bias is None else out.add_(bias)


class Int8Matrix:
    """int8 weights [outputs, inputs] with a float32 scale for each output, and int8 inputs."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.weight = weight
        self.scale = scale

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs], a few tokens at a time."""
        out = torch.empty(len(x), len(self.weight), dtype=x.dtype, device=x.device)
        for first in range(0, len(x), ROUNDED_TOKENS):
            values, scales = int8_tokens(x[first : first + ROUNDED_TOKENS])
            product = torch._int_mm(values, self.weight.T).float()
            out[first : first + ROUNDED_TOKENS] = product.mul_(scales).mul_(self.scale)
        return out if bias is None else out.add_(bias)


def _matrix(weight: QuantizedWeight, tensors: Mapping[str, Tensor]) -> Matrix:
    forms, inputs = weight.forms, weight.inputs
    values = {kind: form for kind, form in forms.items() if not kind.startswith(_BESIDE)}
    if multiplies_integers(tuple(forms.values()), inputs):
        return Int8Matrix(tensors["weight"], _row_scales(weight, tensors["weight_scale"]))
    codec = SymmetricGptq.of(values) or codec_of(values)
    known = inputs is not None or not {"input_scale", "input_global_scale"} & forms.keys()
    if codec is None or not known or "input_zero_point" in forms:
        kinds = ", ".join(f"{kind} {form.dtype or 'floats'}" for kind, form in forms.items())
        raise UnsupportedModelError(
            f"{weight.name} is quantized in a way that the built-in runtime does not execute: "
            f"{kinds}",
            hint="serve this checkpoint with vLLM",
        )
    rounded = None
    if inputs is not None:
        static = tensors.get("input_scale")
        overall = tensors.get("input_global_scale")
        if overall is None and inputs.dtype == "F4_E2M1" and static is not None:
            overall, static = 1 / static.max(), None
        rounded = RoundedInputs(
            inputs,
            static=None if static is None else static.max(),
            overall=None if overall is None else overall.max(),
        )
    if isinstance(codec, Fp8Tensor | Fp8Channel):
        return Fp8Matrix(tensors["weight"], _row_scales(weight, tensors["weight_scale"]), rounded)
    held = {kind: tensor for kind, tensor in tensors.items() if kind in values}
    return DecodedMatrix(codec, weight, held, rounded)


_BESIDE = ("input_", "weight_shape")
"""Kinds that the weight does not depend on."""


@lru_cache(maxsize=1)
def _has_int4_kernel() -> bool:
    """Whether this torch has the kernel and its order of weights: tried once."""
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_ONES, 1)
        scales = torch.ones(1, 16, 2, dtype=torch.bfloat16)
        x = torch.ones(1, 32, dtype=torch.bfloat16)
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)
    except (AttributeError, RuntimeError):
        return False
    return bool((found == 32 * (1 - _MIDDLE + 1)).all())


_ONES = torch.ones(16, 32, dtype=torch.int32)
_MIDDLE = 8
"""The code that means the zero point."""


def _repacked(
    weight: QuantizedWeight, tensors: Mapping[str, Tensor], group: int
) -> tuple[Tensor, Tensor]:
    """Weights and scales for the kernel: those of all experts, or of one matrix."""
    rows, columns = sum(weight.part_rows), weight.columns
    count = weight.experts or 1
    packed = torch.empty(count, rows, columns // 2, dtype=torch.uint8)
    scales = torch.empty(count, columns // group, rows, 2, dtype=torch.bfloat16)
    for expert in range(count):
        held = {k: t[expert] for k, t in tensors.items()} if weight.experts else tensors
        matrix = _matrix(weight, held)
        assert isinstance(matrix, DecodedMatrix)
        codec = matrix.codec
        assert isinstance(codec, Integers)
        for first, length, stored in matrix.pieces(64):
            codes, spans = codec.unpack(stored)
            some = slice(first, first + length)
            packed[expert, some] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                (codes - codec.lowest).int(), 1
            )
            scales[expert, :, some, 0] = spans.factor.T
            zero = 0.0 if spans.zero is None else spans.zero
            scales[expert, :, some, 1] = (spans.factor * (_MIDDLE + codec.lowest - zero)).T
    return packed, scales


_EXECUTED: Mapping[type, str] = {
    Int4Matrix: "by torch's int4 kernel",
    Int8Matrix: "by torch's int8 kernel",
    DecodedMatrix: "decoded when used",
    Fp8Matrix: "fp8 widened when used",
}


def _row_scales(weight: QuantizedWeight, scale: Tensor) -> Tensor:
    """A scale for each output, float32 [outputs]."""
    if weight.forms["weight_scale"].rows:
        return scale.float().flatten()
    return scale.float().flatten().repeat_interleave(torch.tensor(weight.part_rows))


def _some(
    form: Form, tensor: Tensor, part_rows: Sequence[int], part: int, row: int, count: int
) -> Tensor:
    """What a tensor of a fused matrix has for some rows of a part."""
    if not form.rows:
        first = 0 if form.shared else part * form.count
        return tensor.reshape(-1)[first : first + form.count]
    first = sum(cdiv(rows, form.rows) for rows in part_rows[:part]) + row // form.rows
    axis = -1 if form.transposed and form.columns is not None else 0
    return tensor.narrow(axis, first, cdiv(count, form.rows))


class SymmetricGptq(Gptq):
    """GPTQ whose zero points are all alike, so that nobody holds them (vLLM's Marlin neither)."""

    @classmethod
    def of(cls, forms: Mapping[str, Form]) -> "SymmetricGptq | None":
        """The codec, if it is one of these forms."""
        packed = forms.get("qweight")
        if packed is None or packed.rows > 1 or "qzeros" in forms:
            return None
        bits = 32 // (packed.columns or 1)
        return cls(bits, forms["scales"].columns or 0, torch.bfloat16) if bits in (4, 8) else None

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        """Codes and scales of what a checkpoint holds."""
        codes = unpack_words(stored["qweight"].T, self.bits).float().add_(self.lowest)
        scale = stored["scales"].T
        return codes, Scales(factor=scale.float(), stored=scale)
