"""What fills a window of a file: operations cut to it, and the ranges of the source to read.

Ranges that are less than `NEAR_BYTES` apart are read as one, since a request to a distant store
takes as long as that many bytes. So the slices of a cut along the inputs are read one by one if
the rows are long, and as blocks of whole rows if not.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from tightfit.model.pieces import element
from tightfit.sharding.copies import Copy, Decay, TensorCopies, Turn
from tightfit.sharding.decay import decay_rates
from tightfit.sharding.gather import Gather
from tightfit.sharding.parts import Part
from tightfit.sharding.stream.turns import turned
from tightfit.units import dtype_bytes

READ_BYTES = 2**21
NEAR_BYTES = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class Strided:
    """`rows` runs of `row_bytes`, apart by one stride in a source file and by another here."""

    file: str
    source_offset: int
    source_stride: int
    target_offset: int
    target_stride: int
    rows: int
    row_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turned:
    """A transposition from a source file."""

    file: str
    turn: Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Decay rates from logarithms in a source file."""

    file: str
    decay: Decay


Operation = Strided | Turned | Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """`pattern`, over and over, at `offset`."""

    offset: int
    nbytes: int
    pattern: bytes

    def fill(self, window: bytearray, start: int) -> None:
        """Write it into the window that begins at `start`, as far as it lies there."""
        first = max(self.offset, start)
        last = min(self.offset + self.nbytes, start + len(window))
        inside = (first - self.offset) % len(self.pattern)
        count = max(0, last - first)
        data = self.pattern[inside:] + self.pattern * (count // len(self.pattern) + 1)
        window[first - start : first - start + count] = data[:count]


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A range of a source file, and the operations (by number of the file here) that need it."""

    file: str
    start: int
    stop: int
    units: tuple[tuple[int, Operation], ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.stop - self.start


def from_group(group: TensorCopies) -> Iterator[tuple[int, Operation]]:
    """The copies out of one source tensor, with the numbers of their targets."""
    file = group.source.file
    for copy in group.copies:
        yield copy.target, _strided(file, copy)
    for turn in group.turns:
        yield turn.target, Turned(file=file, turn=turn)
    for decay in group.decays:
        yield decay.target, Rates(file=file, decay=decay)


def from_gather(gather: Gather) -> Iterator[Operation]:
    """The slices of every row that are put together."""
    for one in gather.slices:
        yield Strided(
            file=one.file,
            source_offset=one.offset,
            source_stride=one.stride,
            target_offset=gather.offset + one.column,
            target_stride=gather.row_bytes,
            rows=gather.rows,
            row_bytes=one.nbytes,
        )


def constants(part: Part) -> Iterator[Constant]:
    """What a file has of no source: its header, and tensors of one value."""
    yield Constant(offset=0, nbytes=len(part.header), pattern=part.header)
    for one in part.placed:
        if one.tensor.fill and one.tensor.nbytes:
            assert not one.tensor.pieces
            yield Constant(
                offset=one.offset,
                nbytes=one.tensor.nbytes,
                pattern=element(one.tensor.fill, one.tensor.dtype),
            )


def span(operation: Operation | Constant) -> tuple[int, int]:
    """Where in the file it writes first, and where it has ended."""
    match operation:
        case Constant():
            return operation.offset, operation.offset + operation.nbytes
        case Strided():
            start = operation.target_offset
            last = start + (operation.rows - 1) * operation.target_stride
            return start, last + operation.row_bytes
        case Turned(turn=turn):
            lines = turn.row_bytes // turn.item_bytes
            last = turn.target_offset + (lines - 1) * turn.target_stride
            return turn.target_offset, last + turn.rows * turn.item_bytes
        case Rates(decay=decay):
            return decay.target_offset, decay.target_offset + decay.nbytes


def clip(operation: Operation | Constant, start: int, stop: int) -> Iterator[Operation]:
    """What of it writes between two places, in units that read little at a time.

    Both are multiples of 8, so that no element is torn.
    """
    match operation:
        case Constant():
            return
        case Strided(row_bytes=width):
            runs = _runs(
                operation.target_offset, operation.target_stride, operation.rows, width, start, stop
            )
            for row, rows, column, nbytes in runs:
                moved = replace(
                    operation,
                    source_offset=operation.source_offset + row * operation.source_stride + column,
                    target_offset=operation.target_offset + row * operation.target_stride + column,
                    rows=rows,
                    row_bytes=nbytes,
                )
                yield from _strided_units(moved)
        case Turned(turn=turn):
            lines, width = turn.row_bytes // turn.item_bytes, turn.rows * turn.item_bytes
            runs = _runs(turn.target_offset, turn.target_stride, lines, width, start, stop)
            for line, count, column, nbytes in runs:
                first = column // turn.item_bytes
                part = replace(
                    turn,
                    source_offset=turn.source_offset
                    + first * turn.source_stride
                    + line * turn.item_bytes,
                    target_offset=turn.target_offset + line * turn.target_stride + column,
                    rows=nbytes // turn.item_bytes,
                    row_bytes=count * turn.item_bytes,
                )
                yield from (Turned(file=operation.file, turn=one) for one in _turn_units(part))
        case Rates(decay=decay):
            size = dtype_bytes(decay.dtype)
            first = max(0, (start - decay.target_offset) // 4)
            last = min(decay.rows, (stop - decay.target_offset) // 4)
            moved_decay = replace(
                decay,
                source_offset=decay.source_offset + first * size,
                target_offset=decay.target_offset + 4 * first,
                rows=last - first,
            )
            if last > first:
                yield Rates(file=operation.file, decay=moved_decay)


def reads_of(operations: Iterable[tuple[int, Operation]]) -> list[Read]:
    """The ranges that operations of several files need, those that are near as one."""
    by_file: defaultdict[str, list[tuple[int, int, int, Operation]]] = defaultdict(list)
    for number, one in operations:
        first, last = _source_span(one)
        by_file[one.file].append((first, last, number, one))
    reads: list[Read] = []
    for file, wanted in sorted(by_file.items()):
        wanted.sort(key=lambda unit: unit[:3])
        start, stop = wanted[0][:2]
        units: list[tuple[int, Operation]] = []
        for first, last, number, one in wanted:
            near = first - stop < NEAR_BYTES and max(last, stop) - start <= READ_BYTES
            if units and not near and last > stop:
                reads.append(Read(file=file, start=start, stop=stop, units=tuple(units)))
                start, stop, units = first, last, []
            stop = max(stop, last)
            units.append((number, one))
        reads.append(Read(file=file, start=start, stop=stop, units=tuple(units)))
    return reads


def fill(
    window: memoryview, start: int, operation: Operation, data: memoryview, data_start: int
) -> None:
    """Carry an operation out: the window begins at `start` of its file, the data in its source."""
    match operation:
        case Strided():
            at, source = operation.target_offset - start, operation.source_offset - data_start
            width, here = operation.row_bytes, operation.target_stride
            for _ in range(operation.rows):
                window[at : at + width] = data[source : source + width]
                at, source = at + here, source + operation.source_stride
        case Turned(turn=turn):
            first, last = _source_span(operation)
            rows = bytes(data[first - data_start : last - data_start])
            lines = turned(rows, turn, turn.rows, 0)
            width, at = turn.rows * turn.item_bytes, turn.target_offset - start
            for i in range(len(lines) // width):
                window[at : at + width] = lines[i * width : (i + 1) * width]
                at += turn.target_stride
        case Rates(decay=decay):
            first, last = _source_span(operation)
            rates = decay_rates(bytes(data[first - data_start : last - data_start]), decay.dtype)
            at = decay.target_offset - start
            window[at : at + len(rates)] = rates


def _strided(file: str, copy: Copy) -> Strided:
    return Strided(
        file=file,
        source_offset=copy.source_offset,
        source_stride=copy.source_stride,
        target_offset=copy.target_offset,
        target_stride=copy.row_bytes,
        rows=copy.rows,
        row_bytes=copy.row_bytes,
    )


def _runs(
    offset: int, stride: int, rows: int, width: int, start: int, stop: int
) -> Sequence[tuple[int, int, int, int]]:
    """(row, rows, column, bytes of each) of the runs that lie between two places."""
    start, stop = start - offset, stop - offset
    first = max(0, (start - width) // stride + 1)
    last = min(rows, -(-stop // stride))
    if first >= last:
        return ()
    found: list[tuple[int, int, int, int]] = []
    torn_first = first * stride < start
    torn_last = (last - 1) * stride + width > stop
    if torn_first or (torn_last and last - first == 1):
        column = max(0, start - first * stride)
        found.append((first, 1, column, min(width, stop - first * stride) - column))
        first += 1
    if first < last and torn_last:
        last -= 1
        tail = (last, 1, 0, stop - last * stride)
    else:
        tail = None
    if first < last:
        found.append((first, last - first, 0, width))
    return found if tail is None else [*found, tail]


def _strided_units(one: Strided) -> Iterator[Strided]:
    if one.rows > 1 and one.source_stride == one.target_stride == one.row_bytes:
        one = replace(one, rows=1, row_bytes=one.rows * one.row_bytes)
    if one.rows == 1:
        for at in range(0, one.row_bytes, READ_BYTES):
            yield replace(
                one,
                source_offset=one.source_offset + at,
                target_offset=one.target_offset + at,
                row_bytes=min(READ_BYTES, one.row_bytes - at),
            )
        return
    for first, count in _blocks(one.rows, one.source_stride, one.row_bytes):
        block = replace(
            one,
            source_offset=one.source_offset + first * one.source_stride,
            target_offset=one.target_offset + first * one.target_stride,
            rows=count,
        )
        # A long row by itself may be longer than a read.
        yield from _strided_units(block) if count == 1 else (block,)


def _turn_units(turn: Turn) -> Iterator[Turn]:
    for first, count in _blocks(turn.rows, turn.source_stride, turn.row_bytes):
        yield replace(
            turn,
            source_offset=turn.source_offset + first * turn.source_stride,
            target_offset=turn.target_offset + first * turn.item_bytes,
            rows=count,
        )


def _blocks(rows: int, stride: int, width: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of what is read at once: single rows where others are not near."""
    near = stride - width < NEAR_BYTES
    block = max(1, READ_BYTES // stride) if near and stride else 1
    for first in range(0, rows, block):
        yield first, min(block, rows - first)


def _source_span(operation: Operation) -> tuple[int, int]:
    match operation:
        case Strided():
            start = operation.source_offset
            last = start + (operation.rows - 1) * operation.source_stride
            return start, last + operation.row_bytes
        case Turned(turn=turn):
            last = turn.source_offset + (turn.rows - 1) * turn.source_stride
            return turn.source_offset, last + turn.row_bytes
        case Rates(decay=decay):
            size = dtype_bytes(decay.dtype)
            return decay.source_offset, decay.source_offset + decay.rows * size
