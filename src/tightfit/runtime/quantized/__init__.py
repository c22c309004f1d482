"""Linear layers whose weights stay as small in memory as in the checkpoint."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from tightfit.planner.engines.builtin_quantized import int4_group
from tightfit.runtime.layers import Matrix, Weights
from tightfit.runtime.loading.pages import forget
from tightfit.runtime.loading.parameters import QuantizedWeight, RankParameters
from tightfit.runtime.quantized.decoded import DecodedExperts, Fp8Matrix, Int8Matrix, matrix
from tightfit.runtime.quantized.decoded import (
    DecodedMatrix as DecodedMatrix,
)
from tightfit.runtime.quantized.int4 import Int4Matrix as Int4Matrix
from tightfit.runtime.quantized.int4 import has_int4_kernel, repacked
from tightfit.runtime.quantized.packed import CodesMatrix, PackedMatrix, packed_matrices
from tightfit.runtime.quantized.reordered import ReorderedMatrix, has_reordering
from tightfit.runtime.quantized.stored import codec_forms


def rank_weights(
    parameters: RankParameters, tensors: dict[str, Tensor], *, repack: bool = False
) -> Weights:
    """The weights of a rank.

    Args:
        parameters: of the rank.
        tensors: by the names of parameters; those that are repacked take the place of others.
        repack: put weights into the order of kernels: on a GPU those of `runtime.kernels`, for
            16-bit floats, and on a CPU torch's for int4 and bfloat16.

    Raises:
        UnsupportedModelError: a scheme that is not executed.
    """
    matrices: dict[str, Sequence[Matrix]] = {}
    for weight in parameters.quantized:
        mine = {kind: tensors[name] for kind, name in weight.tensors.items()}
        found: Sequence[Matrix] | None = None
        if repack and all(tensor.is_cuda for tensor in mine.values()):
            found = packed_matrices(weight, mine)
            if found is not None:
                for kind in codec_forms(weight):
                    del tensors[weight.tensors[kind]]
        elif repack and has_int4_kernel():
            found = _int4(weight, mine, tensors)
        if found is None:
            found = DecodedExperts(weight, mine) if weight.experts else [matrix(weight, mine)]
        matrices[weight.name] = found
    on_cpu = not any(tensor.is_cuda for tensor in tensors.values())
    if not (repack and on_cpu and has_reordering()):
        return Weights(tensors=tensors, matrices=matrices)
    return Weights(
        tensors=tensors,
        matrices=matrices,
        reorder=lambda name: ReorderedMatrix(tensors.pop(name)),
    )


def executions(weights: Weights) -> dict[str, int]:
    """How quantized layers are executed, and how many are so; experts of a layer count once."""
    found: dict[str, int] = {}
    for matrices in weights.matrices.values():
        how = _EXECUTED[type(matrices[0])]
        found[how] = found.get(how, 0) + 1
    return found


def _int4(
    weight: QuantizedWeight, mine: dict[str, Tensor], tensors: dict[str, Tensor]
) -> Sequence[Matrix] | None:
    group = int4_group(tuple(weight.forms.values()), weight.inputs, weight.part_rows)
    if group is None:
        return None
    packed, scales = repacked(weight, mine, group)
    for kind in codec_forms(weight):
        forget(mine.pop(kind))
        del tensors[weight.tensors[kind]]
    tensors[f"{weight.name} packed"], tensors[f"{weight.name} scales"] = packed, scales
    return [Int4Matrix(*one, group) for one in zip(packed, scales, strict=True)]


_EXECUTED: Mapping[type, str] = {
    Int4Matrix: "by torch's int4 kernel",
    Int8Matrix: "by torch's int8 kernel",
    DecodedMatrix: "decoded when used",
    Fp8Matrix: "fp8 widened when used",
    PackedMatrix: "unpacked in registers",
    CodesMatrix: "multiplied in 8 bits",
}
