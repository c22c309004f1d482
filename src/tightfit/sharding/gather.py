"""Rows that are put together from several tensors: the opposite of a cut along the inputs.

Each rank holds a slice of every row.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from tightfit.checkpoint.header import TensorInfo
from tightfit.model.layout import Piece, RankTensor
from tightfit.sharding.copies import TensorCopies, plan_copies
from tightfit.sharding.parts import Part
from tightfit.units import dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """`nbytes` of every row: `stride` apart in the file, `column` bytes into rows of the target."""

    file: str
    offset: int
    stride: int
    column: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """`rows` rows of `row_bytes` at `offset` of part number `target`, and what fills them."""

    target: int
    offset: int
    row_bytes: int
    rows: int
    slices: tuple[Slices, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return self.rows * sum(one.nbytes for one in self.slices)


def plan(
    parts: Sequence[Part], sources: Mapping[str, TensorInfo]
) -> tuple[tuple[TensorCopies, ...], tuple[Gather, ...]]:
    """Copies and gathers of parts, whose pieces may have more dimensions than their tensors."""
    gathers: list[Gather] = []
    rest: list[Part] = []
    for number, part in enumerate(parts):
        placed = []
        for one in part.placed:
            tensor = _same_depth(one.tensor)
            kept: list[Piece] = []
            scattered: list[Piece] = []
            for piece in tensor.pieces:
                (scattered if _is_scattered(piece, tensor.shape) else kept).append(piece)
            gathers += _gathers(scattered, sources, tensor.shape, number, one.offset)
            placed.append(replace(one, tensor=replace(tensor, pieces=tuple(kept))))
        rest.append(replace(part, placed=tuple(placed)))
    return plan_copies(rest, sources), tuple(gathers)


def copied_bytes(copies: Iterable[TensorCopies], gathers: Iterable[Gather]) -> int:
    """Bytes that a plan writes."""
    return sum(group.nbytes for group in copies) + sum(gather.nbytes for gather in gathers)


def _same_depth(tensor: RankTensor) -> RankTensor:
    """With leading dimensions of one, until no piece has more: experts of a stack."""
    depth = max((len(piece.shape) for piece in tensor.pieces), default=0) - len(tensor.shape)
    if depth <= 0:
        return tensor
    ones, zeros = (1,) * depth, (0,) * depth
    pieces = tuple(replace(piece, at=zeros + piece.at) for piece in tensor.pieces)
    return replace(tensor, shape=ones + tensor.shape, pieces=pieces)


def _is_scattered(piece: Piece, shape: tuple[int, ...]) -> bool:
    if piece.transposed or len(piece.shape) < 2:
        return False
    return piece.shape[-2] > 1 and piece.shape[-1] < shape[-1]


def _gathers(
    pieces: Iterable[Piece],
    sources: Mapping[str, TensorInfo],
    shape: tuple[int, ...],
    target: int,
    offset: int,
) -> Iterable[Gather]:
    """One gather for each range of rows of each matrix."""
    found: defaultdict[tuple[int, int], list[Slices]] = defaultdict(list)
    size = row = 0
    for piece in pieces:
        source = sources[piece.source]
        size = dtype_bytes(source.dtype)
        row = size * shape[-1]
        outer = piece.shape[:-2]
        lead = piece.at[: len(piece.at) - len(piece.shape)]
        for step in product(*map(range, outer)):
            start = (*(a + i for a, i in zip(piece.start, step, strict=False)), *piece.start[-2:])
            inner = piece.at[len(lead) :]
            to = (*lead, *(a + i for a, i in zip(inner, step, strict=False)), inner[-2])
            first_row = _index(to, shape[:-1])
            found[first_row, piece.shape[-2]].append(
                Slices(
                    file=source.file,
                    offset=source.offset + size * _index(start, source.shape),
                    stride=size * source.shape[-1],
                    column=size * inner[-1],
                    nbytes=size * piece.shape[-1],
                )
            )
    for (first_row, rows), slices in found.items():
        yield Gather(
            target=target,
            offset=offset + first_row * row,
            row_bytes=row,
            rows=rows,
            slices=tuple(sorted(slices, key=lambda one: one.column)),
        )


def _index(position: Sequence[int], shape: Sequence[int]) -> int:
    """The number of an element in a tensor."""
    return sum(p * prod(shape[i + 1 :]) for i, p in enumerate(position))
