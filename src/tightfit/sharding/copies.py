"""From boxes to byte ranges: what to read of each source tensor, and where to write it.

A cut along the outputs of a matrix is one contiguous range, which the kernel copies by itself. A
cut along its inputs takes a slice of every row; the slices of all ranks are written from one read.
Matrices that a checkpoint holds the other way round are turned in blocks of rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from tightfit.checkpoint.header import TensorInfo
from tightfit.model.layout import Piece
from tightfit.sharding.parts import Part
from tightfit.units import dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """`rows` runs of `row_bytes`: apart by `source_stride` in the source, adjacent in the target.

    Offsets count from the start of the files; `target` numbers the parts.
    """

    source_offset: int
    source_stride: int
    target: int
    target_offset: int
    rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A transposition: `rows` rows of `row_bytes` become as many columns.

    Every element of a row begins a row of the target; those are `target_stride` apart.
    """

    source_offset: int
    source_stride: int
    target: int
    target_offset: int
    target_stride: int
    rows: int
    row_bytes: int
    item_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Decay:
    """`rows` consecutive values of `dtype` become decay rates in float32."""

    source_offset: int
    dtype: str
    rows: int
    target: int
    target_offset: int

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return 4 * self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCopies:
    """Everything that is copied out of one source tensor."""

    source: TensorInfo
    copies: tuple[Copy, ...]
    turns: tuple[Turn, ...] = ()
    decays: tuple[Decay, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        copied = sum(copy.nbytes for copy in self.copies)
        turned = sum(turn.nbytes for turn in self.turns)
        return copied + turned + sum(decay.nbytes for decay in self.decays)


def plan_copies(
    parts: Iterable[Part], sources: Mapping[str, TensorInfo]
) -> tuple[TensorCopies, ...]:
    """All copies into all parts, by source tensor, in the order of the source files."""
    found: defaultdict[str, list[Copy | Turn | Decay]] = defaultdict(list)
    for number, part in enumerate(parts):
        for placed in part.placed:
            shape, offset = placed.tensor.shape, placed.offset
            for piece in placed.tensor.pieces:
                found[piece.source] += copies(
                    piece, sources[piece.source], shape, target=number, target_offset=offset
                )
    groups = (
        TensorCopies(
            source=sources[name],
            copies=tuple(one for one in members if isinstance(one, Copy)),
            turns=tuple(one for one in members if isinstance(one, Turn)),
            decays=tuple(one for one in members if isinstance(one, Decay)),
        )
        for name, members in found.items()
    )
    return tuple(sorted(groups, key=lambda group: (group.source.file, group.source.offset)))


def copies(
    piece: Piece,
    source: TensorInfo,
    target_shape: tuple[int, ...],
    *,
    target: int,
    target_offset: int,
) -> Iterator[Copy | Turn | Decay]:
    """What carries out one piece, as few and as long ranges as its strides allow.

    Of an empty piece, whose strides mean nothing, there is nothing to carry out.
    """
    if 0 in piece.shape:
        return
    size = dtype_bytes(source.dtype)
    seen = source.shape if piece.view is None else piece.view
    source_strides = _strides(seen)
    source_offset = source.offset + size * _dot(piece.start, source_strides)
    target_strides = _strides(target_shape)
    target_offset += (4 if piece.decay else size) * _dot(piece.at, target_strides)
    if piece.decay:
        assert piece.shape[1:] == seen[1:] == target_shape[1:]
        yield Decay(
            source_offset=source_offset,
            dtype=source.dtype,
            rows=prod(piece.shape),
            target=target,
            target_offset=target_offset,
        )
        return
    inner = target_strides[len(target_strides) - len(piece.shape) :]
    if piece.transposed:
        inner = (*inner[:-2], inner[-1], inner[-2])
    dimensions = _merged(piece.shape, source_strides, inner)
    *outer, rows, row = ((1, 0, 0), (1, 0, 0), *dimensions)
    turned = row[0] > 1 and row[2] != 1
    # Rows that are not adjacent in the target are copied one by one.
    if not turned and rows[0] > 1 and rows[2] != row[0]:
        outer, rows = [*outer, rows], (1, 0, 0)
    steps = (
        [(i * s * size, i * t * size) for i in range(extent)]
        for extent, s, t in outer
        if extent > 1
    )
    for step in product(*steps):
        source_at = source_offset + sum(s for s, _ in step)
        target_at = target_offset + sum(t for _, t in step)
        stride = (rows[1] if rows[0] > 1 else row[0]) * size
        if turned:
            yield Turn(
                source_offset=source_at,
                source_stride=stride,
                target=target,
                target_offset=target_at,
                target_stride=row[2] * size,
                rows=rows[0],
                row_bytes=row[0] * size,
                item_bytes=size,
            )
        else:
            yield Copy(
                source_offset=source_at,
                source_stride=stride,
                target=target,
                target_offset=target_at,
                rows=rows[0],
                row_bytes=row[0] * size,
            )


def _merged(
    shape: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    """(extent, stride in the source, stride in the target) without dimensions that are one run."""
    found: list[tuple[int, int, int]] = []
    for extent, s, t in zip(shape, source, target, strict=True):
        if extent == 1:
            continue
        if found:
            before, outer_s, outer_t = found[-1]
            if (outer_s, outer_t) == (extent * s, extent * t):
                found[-1] = (before * extent, s, t)
                continue
        found.append((extent, s, t))
    # A row is contiguous in the source; a box one element wide is a column of such rows.
    if not found or found[-1][1] != 1:
        found.append((1, 1, 1))
    return found


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _dot(position: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum(p * s for p, s in zip(position, strides, strict=True))
