"""What all blocks are made of: linear layers, fused or not in the checkpoint, and vectors."""

from collections.abc import Callable, Iterator

from tightfit.model.layout import Axis, Cut, Part, Stage, Weight

Parts = Callable[[str], tuple[Part, ...]]
"""The parts of a linear layer's `weight` or `bias`."""


def stack(
    prefix: str, fused: str | None, members: tuple[tuple[str, Axis], ...], *, groups: int = 1
) -> Parts:
    """Members stacked along the output: each a tensor of its own, or rows of one fused tensor.

    With several `groups` the fused tensor holds all members of the first one, then of the next.
    """

    def parts(kind: str) -> tuple[Part, ...]:
        if fused is None:
            names = [name for name, _ in members]
            return tuple(
                Part(
                    source=f"{prefix}.{name}.{kind}",
                    rows=axis.rows,
                    axis=axis,
                    repeats=name in names[:i],
                )
                for i, (name, axis) in enumerate(members)
            )
        total = sum(axis.rows for _, axis in members)
        found: list[Part] = []
        for _, axis in members:
            found.append(
                Part(
                    source=f"{prefix}.{fused}.{kind}",
                    rows=axis.rows,
                    axis=axis,
                    first_row=sum(part.rows for part in found) // groups,
                    source_rows=total,
                    run_rows=axis.rows // groups if groups > 1 else 0,
                    run_stride=total // groups if groups > 1 else 0,
                )
            )
        return tuple(found)

    return parts


def linear(
    name: str,
    parts: Parts,
    *,
    columns: int,
    cut: Cut,
    where: int | Stage,
    bias: bool,
    input_axis: Axis | None = None,
    transposed: bool = False,
) -> Iterator[Weight]:
    """A weight and its bias; the bias of a row parallel layer is whole on every rank."""
    yield Weight(
        name=f"{name}.weight",
        parts=parts("weight"),
        columns=columns,
        cut=cut,
        input_axis=input_axis,
        where=where,
        transposed=transposed,
        linear=True,
    )
    if bias:
        bias_cut = Cut.OUTPUT if cut is Cut.OUTPUT else Cut.NONE
        yield Weight(name=f"{name}.bias", parts=parts("bias"), cut=bias_cut, where=where)


def replicated(
    name: str, *, rows: int, columns: int, where: int | Stage, bias: bool = False
) -> Iterator[Weight]:
    """A linear layer that is whole on every rank, with the same name in the checkpoint."""
    yield from linear(
        name,
        lambda kind: (Part(source=f"{name}.{kind}", rows=rows),),
        columns=columns,
        cut=Cut.NONE,
        where=where,
        bias=bias,
    )


def column_parallel(
    name: str, axis: Axis, *, columns: int, where: int | Stage, bias: bool = False
) -> Iterator[Weight]:
    """A linear layer whose outputs are dealt by `axis`, with the same name in the checkpoint."""
    yield from linear(
        name,
        lambda kind: (Part(source=f"{name}.{kind}", rows=axis.rows, axis=axis),),
        columns=columns,
        cut=Cut.OUTPUT,
        where=where,
        bias=bias,
    )


def row_parallel(
    name: str, axis: Axis, *, rows: int, where: int | Stage, bias: bool = False
) -> Iterator[Weight]:
    """A linear layer whose inputs are dealt by `axis`, with the same name in the checkpoint."""
    yield from linear(
        name,
        lambda kind: (Part(source=f"{name}.{kind}", rows=rows),),
        columns=axis.rows,
        cut=Cut.INPUT,
        input_axis=axis,
        where=where,
        bias=bias,
    )


def vector(name: str, size: int, where: int | Stage, dtype: str | None = None) -> Weight:
    """A norm or the like, whole on every rank, with the same name in the checkpoint."""
    return Weight(name=name, parts=(Part(source=name, rows=size),), where=where, dtype=dtype)


def norm(prefix: str, size: int, where: int | Stage, *, bias: bool = False) -> Iterator[Weight]:
    """A norm's weight, and its bias if it has one."""
    yield vector(f"{prefix}.weight", size, where)
    if bias:
        yield vector(f"{prefix}.bias", size, where)
