"""Whether a tensor of a rank's file holds what its pieces say, byte by byte.

Every copy is planned again as for writing; what no copy covers has to be `fill`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod

from tightfit.checkpoint.header import TensorInfo
from tightfit.model.pieces import element
from tightfit.sharding.copies import Copy, Decay, Turn, copies
from tightfit.sharding.decay import RATES_OF, decay_rates
from tightfit.sharding.manifest import StoredTensor
from tightfit.sharding.stream.source_files import BUFFER_BYTES, SourceFiles
from tightfit.sharding.stream.turns import turned
from tightfit.units import dtype_bytes

Read = Callable[[int, int], bytes]
"""Gives the bytes of the file that is checked, from one place to another."""


def equal(
    read: Read, tensor: StoredTensor, sources: Mapping[str, TensorInfo], files: SourceFiles
) -> bool:
    """Compare a tensor of a file with its sources, in blocks of a few megabytes."""
    planned: list[Copy | Turn | Decay] = []
    for piece in tensor.pieces:
        info = sources[piece.source]
        seen = info.shape if piece.view is None else piece.view
        alike = info.dtype in RATES_OF if piece.decay else info.dtype == tensor.dtype
        # A view that is larger than the tensor would see what lies behind it.
        if (
            not alike
            or prod(seen) != prod(info.shape)
            or not _inside(piece.start, piece.shape, seen)
        ):
            return False
        found = copies(piece, info, tensor.shape, target=0, target_offset=tensor.offset)
        for copy in found:
            if not same(read, copy, info.file, files):
                return False
            planned.append(copy)
    return _filled(read, tensor, planned)


def same(read: Read, copy: Copy | Turn | Decay, file: str, files: SourceFiles) -> bool:
    """Whether a file already holds what a copy from a source file would write there."""
    return all(map(_Compared(read, file, files), _blocks(copy)))


def same_bytes(
    one: TensorInfo, other: TensorInfo, files: SourceFiles, other_files: SourceFiles | None = None
) -> bool:
    """Whether two tensors hold the same; they are in the same files unless others are given."""
    copy = Copy(
        source_offset=other.offset,
        source_stride=other.nbytes,
        target=0,
        target_offset=one.offset,
        rows=1,
        row_bytes=other.nbytes,
    )
    return one.nbytes == other.nbytes and same(
        partial(files.read, one.file), copy, other.file, other_files or files
    )


class _Compared:
    """Compares one block of a copy."""

    def __init__(self, read: Read, file: str, files: SourceFiles) -> None:
        self.read, self.file, self.files = read, file, files

    def __call__(self, copy: Copy | Turn | Decay) -> bool:
        if isinstance(copy, Decay):
            start = copy.source_offset
            data = self.files.read(self.file, start, start + copy.rows * dtype_bytes(copy.dtype))
            return self._holds(copy.target_offset, decay_rates(data, copy.dtype))
        stride, start = copy.source_stride, copy.source_offset
        end = start + (copy.rows - 1) * stride + copy.row_bytes
        data = self.files.read(self.file, start, end)
        if isinstance(copy, Copy):
            rows = (data[i * stride : i * stride + copy.row_bytes] for i in range(copy.rows))
            wanted = data if copy.rows == 1 else b"".join(rows)
            return self._holds(copy.target_offset, wanted)
        lines, width = bytes(turned(data, copy, copy.rows, 0)), copy.rows * copy.item_bytes
        return all(
            self._holds(
                copy.target_offset + i * copy.target_stride, lines[i * width : (i + 1) * width]
            )
            for i in range(len(lines) // width)
        )

    def _holds(self, at: int, wanted: bytes) -> bool:
        return self.read(at, at + len(wanted)) == wanted


def _blocks(copy: Copy | Turn | Decay) -> Iterator[Copy | Turn | Decay]:
    """The copy in blocks of rows, or a long row in blocks of bytes."""
    if isinstance(copy, Decay):
        block = BUFFER_BYTES // 8
        for first in range(0, copy.rows, block):
            yield replace(
                copy,
                source_offset=copy.source_offset + first * dtype_bytes(copy.dtype),
                target_offset=copy.target_offset + 4 * first,
                rows=min(block, copy.rows - first),
            )
        return
    if isinstance(copy, Copy) and copy.rows == 1:
        for at in range(0, copy.row_bytes, BUFFER_BYTES):
            size = min(BUFFER_BYTES, copy.row_bytes - at)
            yield replace(
                copy,
                source_offset=copy.source_offset + at,
                source_stride=size,
                target_offset=copy.target_offset + at,
                row_bytes=size,
            )
        return
    block = max(1, BUFFER_BYTES // copy.source_stride)
    for first in range(0, copy.rows, block):
        rows = min(block, copy.rows - first)
        source = copy.source_offset + first * copy.source_stride
        step = copy.row_bytes if isinstance(copy, Copy) else copy.item_bytes
        target = copy.target_offset + first * step
        yield replace(copy, source_offset=source, target_offset=target, rows=rows)


def _filled(read: Read, tensor: StoredTensor, planned: list[Copy | Turn | Decay]) -> bool:
    """Whether the bytes between the copies are `fill`, and the copies do not overlap."""
    covered = sorted(span for copy in planned for span in _spans(copy))
    fill = element(tensor.fill, tensor.dtype) if tensor.fill else b"\0"
    at, end = tensor.offset, tensor.offset + tensor.nbytes
    for first, last in [*covered, (end, end)]:
        if first < at or last > end:
            return False
        while at < first:
            size = min(BUFFER_BYTES, first - at)
            if read(at, at + size) != fill * (size // len(fill)):
                return False
            at += size
        at = last
    return True


def _spans(copy: Copy | Turn | Decay) -> Iterator[tuple[int, int]]:
    """The ranges of the target that a copy writes."""
    start = copy.target_offset
    if not isinstance(copy, Turn):
        yield start, start + copy.nbytes
        return
    width, lines = copy.rows * copy.item_bytes, copy.row_bytes // copy.item_bytes
    if width == copy.target_stride:
        yield start, start + width * lines
        return
    for i in range(lines):
        yield start + i * copy.target_stride, start + i * copy.target_stride + width


def _inside(start: tuple[int, ...], shape: tuple[int, ...], extents: tuple[int, ...]) -> bool:
    if not len(start) == len(shape) == len(extents):
        return False
    return all(s + n <= extent for s, n, extent in zip(start, shape, extents, strict=True))
