"""The tensors that stand for one weight matrix, as data: a `Form` each.

A quantized `[rows, columns]` matrix becomes a few tensors whose shapes are those of the matrix with
rows or columns counted in blocks: 8 columns to a 32-bit word, 128 columns to a scale, all of a row
to a scale. Whatever fuses, cuts or stacks the weight does the same to them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tightfit.errors import LayoutError
from tightfit.model.layout import Axis, Cut, Part, Weight
from tightfit.units import cdiv


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One tensor of a quantized weight."""

    kind: str
    """What stands in names where `weight` stood."""
    dtype: str | None
    """As stored; None for the model's own."""
    engine_dtype: str | None = None
    engine_kind: str | None = None
    """As an engine calls it, if otherwise."""
    rows: int = 1
    """Rows of the weight that share one of this tensor; 0: all of a part share `count` values."""
    columns: int | None = 1
    """Columns that share one; 0: all do; None: there is no second dimension."""
    count: int = 1
    ragged: bool = False
    """The last block may be smaller."""
    local: bool = False
    """Computed by the engine from what a rank holds, so that any block may be smaller."""
    transposed: bool = False
    """Stored and held as `[columns, rows]`."""
    nested: int = 0
    """The checkpoint gives groups of so many columns a dimension of their own."""
    stored: bool = True
    loaded: bool = True
    optional: bool = False
    """Some checkpoints leave it out."""
    shared: bool = False
    """A fused layer of an engine has only one of it."""
    dropped: bool = False
    """Freed when a kernel has taken its own copy of the weight."""
    only: str | None = None
    """`linear` or `experts`, where the other has none."""
    scalar: bool = False
    """An engine holds it without dimensions."""
    fill: float = 0.0
    """What an engine has where the checkpoint has nothing."""


Forms = tuple[Form, ...]


def stored(weight: Weight, forms: Forms) -> Iterator[Weight]:
    """The checkpoint's tensors for a weight.

    Raises:
        LayoutError: groups or words do not divide the weight.
    """
    return (tensor for _, tensor in stored_forms(weight, forms))


def stored_forms(weight: Weight, forms: Forms) -> Iterator[tuple[Form, Weight]]:
    """The same, each with its form.

    Raises:
        LayoutError: groups or words do not divide the weight.
    """
    for form in forms:
        if form.stored and _applies(form, weight):
            yield form, _tensor(weight, form)


def loaded(weight: Weight, forms: Forms) -> Iterator[Weight]:
    """An engine's tensors for a weight.

    Raises:
        LayoutError: groups or words do not divide the weight.
    """
    return (tensor for _, tensor in created(weight, forms))


def created(weight: Weight, forms: Forms) -> Iterator[tuple[Form, Weight]]:
    """The same, each with its form.

    Raises:
        LayoutError: groups or words do not divide the weight.
    """
    for form in forms:
        if form.loaded and _applies(form, weight):
            _check_fused(weight, form)
            tensor = _tensor(weight, form)
            # The last part is loaded last.
            yield form, replace(tensor, parts=tensor.parts[-1:]) if form.shared else tensor


def _check_fused(weight: Weight, form: Form) -> None:
    """Only the last part of a fused matrix may end in a smaller block (vLLM's `fp8_utils.py`)."""
    for part in weight.parts[:-1] if form.ragged and form.rows and not form.local else ():
        if part.rows % form.rows:
            raise LayoutError(
                f"{tail(weight)} fuses a matrix of {part.rows} outputs with others, and blocks of "
                f"{form.rows} rows do not divide it",
                hint="use one scale for each output channel (fp8-channel)",
            )


def _applies(form: Form, weight: Weight) -> bool:
    return form.only is None or (form.only == "experts") == (weight.experts > 0)


def _tensor(weight: Weight, form: Form) -> Weight:
    assert weight.columns is not None
    parts = tuple(_part(part, form, weight) for part in weight.parts)
    columns = form.columns
    whole = weight.cut is Cut.OUTPUT and not form.rows
    whole = whole or (weight.cut is Cut.INPUT and not columns)
    count: int | None = None
    if columns is not None:
        count = cdiv(weight.columns, columns) if columns else 1
        if columns and not form.ragged and weight.columns % columns:
            raise LayoutError(
                f"{tail(weight)} has {weight.columns} input features, which {columns} do not "
                f"divide ({form.kind} holds one value for {columns} of them)",
                hint=_smaller(weight.columns, columns),
            )
    tensor = replace(
        weight,
        name=_engine_name(weight.name, form.engine_kind or form.kind),
        dtype=form.dtype,
        engine_dtype=form.engine_dtype,
        parts=parts,
        columns=count,
        cut=Cut.NONE if whole else weight.cut,
        input_axis=None
        if whole or not columns
        else _blocked(weight.input_axis, columns, form, f"inputs of {tail(weight)}"),
        transposed=form.transposed and columns is not None,
        linear=False,
        optional=form.optional,
        dropped=form.dropped,
    )
    if form.nested and count is not None:
        *outer, last = tensor.source_shape(parts[0])
        return replace(tensor, stored_shape=(*outer, last // form.nested, form.nested))
    return tensor


def _smaller(inputs: int, group_size: int) -> str:
    sizes = [size for size in (64, 32) if size < group_size and inputs % size == 0]
    if sizes:
        return f"groups of {sizes[0]} divide it"
    return "one scale for each output channel needs no groups (fp8-channel, int8)"


def _part(part: Part, form: Form, weight: Weight) -> Part:
    source = _source(part.source, form.kind)
    if not form.rows:
        return Part(source=source, rows=form.count, repeats=part.repeats)
    if part.rows % form.rows and not form.ragged:
        raise LayoutError(
            f"{tail(weight)} has {part.rows} outputs, which do not fill words of {form.rows}",
            hint="this scheme cannot hold such a layer",
        )
    return replace(
        part,
        source=source,
        rows=cdiv(part.rows, form.rows),
        axis=_blocked(part.axis, form.rows, form, f"outputs of {tail(weight)}"),
        first_row=part.first_row // form.rows,
        source_rows=cdiv(part.source_rows, form.rows),
        run_rows=part.run_rows // form.rows,
        run_stride=part.run_stride // form.rows,
    )


def _blocked(axis: Axis | None, block: int, form: Form, what: str) -> Axis | None:
    if axis is None or block == 1:
        return axis
    return replace(axis.in_blocks(block, what), local_blocks=form.local)


def tail(weight: Weight) -> str:
    """The end of a weight's name, alike in all layers: `mlp.down_proj`."""
    module = weight.name.removesuffix(".weight").removesuffix("_weight")
    return ".".join(module.split(".")[-2:])


def _engine_name(name: str, kind: str) -> str:
    return f"{name.removesuffix('weight')}{kind}" if name.endswith("weight") else f"{name}_{kind}"


def _source(name: str, kind: str) -> str:
    module, dot, last = name.rpartition(".")
    return f"{module}.{kind}" if dot and last == "weight" else f"{name}_{kind}"
