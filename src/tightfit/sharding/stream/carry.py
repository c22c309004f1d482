"""Units of work, block by block through one buffer: every source byte is read once.

Rows of which every rank takes a slice are scattered by the kernel while it reads them: each rank's
slices arrive side by side, and are written with one call. What is put together from slices of
several tensors is gathered in the same way.
"""

import mmap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import gcd
from threading import Lock
from typing import Protocol

from tightfit.sharding.copies import Copy, Decay, TensorCopies, Turn
from tightfit.sharding.decay import decay_rates
from tightfit.sharding.gather import Gather, Slices
from tightfit.sharding.parts import PAGE_BYTES
from tightfit.sharding.stream.source_files import BUFFER_BYTES, Batch, SourceFiles, batches
from tightfit.sharding.stream.turns import GAP_BYTES, Rows, block_of_rows, turned
from tightfit.units import dtype_bytes

_MOST_SLICES = 8192
"""Of a block: each is an object of 200 bytes, and they are kept for the next tensor."""
_MOST_LAYOUTS = 4
_COPY_BYTES = 2**22
_BUFFERS_OF_TURNS = 8
"""Buffers that a block of rows to be turned may fill: more rows make longer writes."""

_turning = Lock()

Column = tuple[int, int]
"""Where in a row a slice begins, and its bytes."""


class Sink(Protocol):
    """Takes bytes for part number `target`, from `offset` on."""

    def put(self, target: int, offset: int, data: memoryview, *, aligned: bool) -> None:
        """Write them; `aligned` says that they begin at a page of memory."""

    def put_lines(
        self, target: int, offset: int, stride: int, data: memoryview, nbytes: int
    ) -> None:
        """Write lines of `nbytes`, `stride` apart."""


class Carrier:
    """Carries out one unit at a time; a thread needs one of its own.

    Units raise `CheckpointError` if a source file ends before its header says so, and whatever the
    sink raises.
    """

    def __init__(self, files: SourceFiles, sink: Sink, buffer_bytes: int | None = None) -> None:
        self._files, self._sink = files, sink
        self._nbytes = BUFFER_BYTES if buffer_bytes is None else buffer_bytes
        self._buffer = memoryview(mmap.mmap(-1, self._nbytes))
        self._layouts: dict[object, list[Batch]] = {}

    def carry(self, unit: TensorCopies | Gather) -> None:
        """Read, cut, and put."""
        if isinstance(unit, Gather):
            self._gather(unit)
            return
        file = unit.source.file
        ranges: defaultdict[tuple[int, int], list[Copy]] = defaultdict(list)
        strided: defaultdict[tuple[int, int, int], list[Copy]] = defaultdict(list)
        turns: defaultdict[tuple[int, int, int], list[Turn]] = defaultdict(list)
        for copy in unit.copies:
            if copy.rows > 1:
                strided[_rows_of(unit, copy)].append(copy)
            else:
                ranges[copy.source_offset, copy.row_bytes].append(copy)
        for turn in unit.turns:
            turns[_rows_of(unit, turn)].append(turn)
        for (start, nbytes), alike in ranges.items():
            self._copy(file, start, nbytes, [(c.target, c.target_offset) for c in alike])
        for (base, stride, rows), some in strided.items():
            self._scatter(file, base, stride, rows, some)
        for (base, stride, rows), few in turns.items():
            # Their blocks are large: one at a time.
            with _turning:
                self._turn(file, base, stride, rows, few)
        for decay in unit.decays:
            self._decay(file, decay)

    def _copy(self, file: str, start: int, nbytes: int, targets: list[tuple[int, int]]) -> None:
        block, done = min(_COPY_BYTES, self._nbytes), 0
        # The first block is shorter where all that follow are aligned for it.
        size = block - targets[0][1] % PAGE_BYTES if block > PAGE_BYTES else block
        while done < nbytes:
            data = self._buffer[: min(size, nbytes - done)]
            self._files.read_into(file, [([data], len(data))], start + done)
            for target, offset in targets:
                self._sink.put(target, offset + done, data, aligned=True)
            done += len(data)
            size = block

    def _scatter(
        self, file: str, base: int, stride: int, rows: int, copies: Sequence[Copy]
    ) -> None:
        columns = tuple(sorted({(copy.source_offset - base, copy.row_bytes) for copy in copies}))
        row = _with_gaps(columns, stride)
        block = self._rows_of_block(columns, row) if row is not None else 0
        if row is None or block < 1:
            # They overlap, or are longer than the buffer.
            for copy in copies:
                for i in range(rows):
                    at = copy.target_offset + i * copy.row_bytes
                    start = copy.source_offset + i * stride
                    self._copy(file, start, copy.row_bytes, [(copy.target, at)])
            return
        block = min(block, rows)
        places, end = _places(columns, block)
        for first in range(0, rows, block):
            count = min(block, rows - first)
            layout = self._layout(
                (columns, stride, block, count),
                (
                    (places[column] + i * column[1] if column in places else end, column[1])
                    for i in range(count)
                    for column in row
                ),
            )
            self._files.read_into(file, layout, base + first * stride)
            for copy in copies:
                at = places[copy.source_offset - base, copy.row_bytes]
                data = self._buffer[at : at + count * copy.row_bytes]
                offset = copy.target_offset + first * copy.row_bytes
                self._sink.put(copy.target, offset, data, aligned=True)

    def _rows_of_block(self, columns: Sequence[Column], row: Sequence[Column]) -> int:
        """As many as fit, in whole pages for each rank if possible."""
        gap = max((nbytes for column, nbytes in row if (column, nbytes) not in columns), default=0)
        room = self._nbytes - gap - PAGE_BYTES * len(columns)
        fit = min(room // sum(n for _, n in columns), max(1, _MOST_SLICES // len(row)))
        step = max(PAGE_BYTES // gcd(nbytes, PAGE_BYTES) for _, nbytes in columns)
        return fit // step * step or fit

    def _layout(self, key: object, slices: Iterable[tuple[int, int]]) -> list[Batch]:
        """The buffer as a block is read into it; `slices` are places and sizes."""
        found = self._layouts.get(key)
        if found is None:
            views = [self._buffer[at : at + nbytes] for at, nbytes in slices]
            if len(self._layouts) >= _MOST_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            found = self._layouts[key] = batches(views)
        return found

    def _turn(self, file: str, base: int, stride: int, rows: int, turns: Sequence[Turn]) -> None:
        apart = stride + GAP_BYTES
        block = min(rows, max(1, _BUFFERS_OF_TURNS * self._nbytes // apart))
        data = block_of_rows(turns[0], block, apart)
        view = memoryview(data).cast("B")
        layout = [view[i * apart : i * apart + stride] for i in range(block)]
        for first in range(0, rows, block):
            count = min(block, rows - first)
            self._files.read_into(file, batches(layout[:count]), base + first * stride)
            for turn in turns:
                self._put_turned(data, turn, first, count, turn.source_offset - base, apart)

    def _put_turned(
        self, data: Rows, turn: Turn, first: int, count: int, column: int, apart: int
    ) -> None:
        item, width = turn.item_bytes, count * turn.item_bytes
        at = turn.target_offset + first * item
        step = max(1, self._nbytes // width)
        # As many lines as keep what is written at pages.
        step = step // PAGE_BYTES * PAGE_BYTES or 2 ** (step.bit_length() - 1)
        columns = turn.row_bytes // item
        for i in range(0, columns, step):
            some = replace(turn, row_bytes=min(step, columns - i) * item)
            into = self._buffer[: count * some.row_bytes] if self._nbytes >= width else None
            lines = turned(data, some, count, column + i * item, stride=apart, into=into)
            place = at + i * turn.target_stride
            if width == turn.target_stride:
                self._sink.put(turn.target, place, lines, aligned=into is not None)
            else:
                self._sink.put_lines(turn.target, place, turn.target_stride, lines, width)

    def _decay(self, file: str, decay: Decay) -> None:
        size, block = dtype_bytes(decay.dtype), max(1, self._nbytes // 8)
        for first in range(0, decay.rows, block):
            count = min(block, decay.rows - first)
            start = decay.source_offset + first * size
            data = self._files.read(file, start, start + count * size)
            rates = memoryview(decay_rates(data, decay.dtype))
            self._sink.put(decay.target, decay.target_offset + 4 * first, rates, aligned=False)

    def _gather(self, gather: Gather) -> None:
        width = gather.row_bytes
        whole = sum(one.nbytes for one in gather.slices) == width
        block = min(gather.rows, self._nbytes // width, _MOST_SLICES)
        step = PAGE_BYTES // gcd(width, PAGE_BYTES)
        block = block // step * step or block
        if not whole or block < 1:
            for one in gather.slices:
                self._gather_slices(gather, one)
            return
        for first in range(0, gather.rows, block):
            count = min(block, gather.rows - first)
            for one in gather.slices:
                layout = self._layout(
                    (width, one.column, one.nbytes, count),
                    ((one.column + i * width, one.nbytes) for i in range(count)),
                )
                self._read_slices(one, first, layout)
            data = self._buffer[: count * width]
            self._sink.put(gather.target, gather.offset + first * width, data, aligned=True)

    def _gather_slices(self, gather: Gather, one: Slices) -> None:
        """One at a time, where others fill the rest of the rows, or a row is very long."""
        block = max(1, min(self._nbytes // one.nbytes, _MOST_SLICES))
        for first in range(0, gather.rows, block):
            count = min(block, gather.rows - first)
            data = memoryview(bytearray(count * one.nbytes))
            cells = [data[i * one.nbytes : (i + 1) * one.nbytes] for i in range(count)]
            self._read_slices(one, first, batches(cells))
            at = gather.offset + first * gather.row_bytes + one.column
            self._sink.put_lines(gather.target, at, gather.row_bytes, data, one.nbytes)

    def _read_slices(self, one: Slices, first: int, layout: list[Batch]) -> None:
        start = one.offset + first * one.stride
        if one.stride == one.nbytes:
            self._files.read_into(one.file, layout, start)
            return
        for views, _ in layout:
            nbytes = (len(views) - 1) * one.stride + one.nbytes
            data = memoryview(self._files.read(one.file, start, start + nbytes))
            for i, view in enumerate(views):
                view[:] = data[i * one.stride : i * one.stride + one.nbytes]
            start += len(views) * one.stride


def _with_gaps(columns: Sequence[Column], stride: int) -> list[Column] | None:
    """All of a row in order, with what is not wanted; None if columns overlap."""
    row: list[Column] = []
    at = 0
    for column, nbytes in (*columns, (stride, 0)):
        if column < at:
            return None
        if column > at:
            row.append((at, column - at))
        if nbytes:
            row.append((column, nbytes))
        at = column + nbytes
    return row


def _places(columns: Sequence[Column], rows: int) -> tuple[dict[Column, int], int]:
    """Where in the buffer the slices of each column gather, at a page each; and the end of all."""
    places: dict[Column, int] = {}
    at = 0
    for column in columns:
        places[column] = at
        at += -(-rows * column[1] // PAGE_BYTES) * PAGE_BYTES
    return places, at


def _rows_of(unit: TensorCopies, copy: Copy | Turn) -> tuple[int, int, int]:
    """(offset of the first whole row, stride, rows): copies with the same come from one read."""
    if copy.rows == 1:
        return copy.source_offset, copy.row_bytes, 1
    stride = copy.source_stride
    inside = (copy.source_offset - unit.source.offset) % stride
    return copy.source_offset - inside, stride, copy.rows
