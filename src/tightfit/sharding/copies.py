"""From boxes to byte ranges: what to read of each source tensor, and where to write it.

A cut along the outputs of a matrix is one contiguous range, which the kernel copies by itself. A
cut along its inputs takes a slice of every row; the slices of all ranks are written from one read.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from tightfit.checkpoint.header import TensorInfo
from tightfit.model.layout import Piece
from tightfit.sharding.parts import Part, Placed
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
class TensorCopies:
    """Everything that is copied out of one source tensor."""

    source: TensorInfo
    copies: tuple[Copy, ...]


def plan_copies(
    parts: Iterable[Part], sources: Mapping[str, TensorInfo]
) -> tuple[TensorCopies, ...]:
    """All copies into all parts, by source tensor, in the order of the source files."""
    found: defaultdict[str, list[Copy]] = defaultdict(list)
    for number, part in enumerate(parts):
        for placed in part.placed:
            for piece in placed.tensor.pieces:
                found[piece.source].append(_copy(piece, placed, number, sources[piece.source]))
    groups = (TensorCopies(source=sources[name], copies=tuple(c)) for name, c in found.items())
    return tuple(sorted(groups, key=lambda group: (group.source.file, group.source.offset)))


def _copy(piece: Piece, placed: Placed, target: int, source: TensorInfo) -> Copy:
    size = dtype_bytes(source.dtype)
    source_row = prod(source.shape[1:]) * size
    row_bytes = prod(piece.shape[1:]) * size
    source_offset = source.offset + piece.start[0] * source_row
    if len(piece.start) > 1:
        source_offset += piece.start[1] * size
    rows = piece.shape[0]
    assert len(piece.shape) == 1 or piece.shape[-1] == placed.tensor.shape[-1], "rows are filled"
    if row_bytes == source_row:
        rows, row_bytes, source_row = 1, rows * row_bytes, rows * row_bytes
    return Copy(
        source_offset=source_offset,
        source_stride=source_row,
        target=target,
        target_offset=placed.offset + _flat(piece.at, placed.tensor.shape) * size,
        rows=rows,
        row_bytes=row_bytes,
    )


def _flat(at: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Index of an element in row-major order."""
    index = 0
    for position, extent in zip(at, shape, strict=True):
        index = index * extent + position
    return index
