"""The matrices of a checkpoint that are quantized: where they lie, and what will stand for them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tightfit.checkpoint.header import TensorInfo
from tightfit.errors import CheckpointError
from tightfit.model.layout import Part, Weight
from tightfit.model.quantization.forms import Form, stored_forms
from tightfit.model.quantization.recipe import split_experts
from tightfit.model.quantization.written import Choice, Decisions, matrices, module_name
from tightfit.model.spec import ModelSpec

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A tensor that is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """`[rows, columns]` of a source tensor, and the tensors that will stand for it, by kind.

    Elements of a row are adjacent from `first` on, and rows are `pitch` apart; of a `transposed`
    one it is the columns that are.
    """

    module: str
    source: TensorInfo
    rows: int
    columns: int
    first: int
    pitch: int
    transposed: bool
    choice: Choice
    outputs: Mapping[str, Output]
    fused: str
    """The same for all that an engine holds as one, whose largest value may be needed."""


def quantized_matrices(
    spec: ModelSpec, decisions: Decisions, tensors: Mapping[str, TensorInfo]
) -> tuple[Matrix, ...]:
    """All of them, in the order of the model.

    Args:
        spec: the model, unquantized.
        decisions: what becomes of each matrix.
        tensors: of the checkpoint.

    Raises:
        LayoutError: groups or words do not divide a matrix.
        CheckpointError: it is not stored as floats.
    """
    found: dict[str, Matrix] = {}
    for weight in matrices(spec):
        for matrix in matrices_of(weight, decisions, tensors):
            found.setdefault(matrix.module, matrix)
    return tuple(found.values())


def matrices_of(
    weight: Weight, decisions: Decisions, tensors: Mapping[str, TensorInfo]
) -> Iterator[Matrix]:
    """Those of one weight; none if it stays as it is.

    Raises:
        LayoutError, UnsupportedModelError, CheckpointError: as `quantized_matrices`.
    """
    split = split_experts(weight)
    choice = decisions[module_name(split.parts[0].source)]
    if choice is None:
        return
    forms = list(stored_forms(split, choice.forms))
    for number, (part, apart) in enumerate(zip(weight.parts, split.parts, strict=True)):
        for expert in range(max(weight.experts, 1)):
            info = tensors[part.source.format(expert=expert)]
            if info.dtype not in FLOATS:
                raise CheckpointError(
                    f"tensor {info.name!r} has the dtype {info.dtype}, which cannot be quantized",
                    hint=f"weights are quantized from {', '.join(FLOATS)}",
                )
            source = apart.source.format(expert=expert)
            rows, first, pitch = place(weight, part, expert)
            yield Matrix(
                module=source.removesuffix(".weight"),
                source=info,
                rows=rows,
                columns=weight.columns or 0,
                first=first,
                pitch=pitch,
                transposed=weight.transposed,
                choice=choice,
                outputs={
                    form.kind: Output(
                        name=tensor.parts[number].source.format(expert=expert),
                        dtype=tensor.dtype or info.dtype,
                        shape=_shape(form, tensor.source_shape(tensor.parts[number])),
                    )
                    for form, tensor in forms
                },
                fused=f"{weight.name} {expert}" if weight.experts else weight.name,
            )


def _shape(form: Form, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What belongs to the inputs alone has one dimension: GPTQ's `g_idx`."""
    return shape[-1:] if not form.rows and form.columns else shape


def place(weight: Weight, part: Part, expert: int) -> tuple[int, int, int]:
    """Rows, first element and pitch in a plain tensor; one shared by several parts is a matrix."""
    assert weight.columns is not None
    rows = part.source_rows or part.rows
    if not weight.stacked:
        return rows, 0, weight.columns
    first = expert * rows * weight.columns
    if weight.transposed:
        return part.rows, first + part.first_row, rows
    return part.rows, first + part.first_row * weight.columns, weight.columns
