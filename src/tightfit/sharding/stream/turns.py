"""Transposition of blocks of rows, with numpy where it is installed.

Rows of most weights are a power of two apart, and then all elements of a column compete for the
same few lines of a processor's cache. So rows to be turned are better read with gaps between them.
"""

from array import array
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeAlias

from tightfit.sharding.copies import Turn

GAP_BYTES = 64
"""What to leave between rows: a line of the cache."""

_ITEMS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_TILE_ROWS, _TILE_COLUMNS = 512, 32
_WORTH_NUMPY = 2**20
"""Bytes to turn from which on importing numpy pays."""

Rows: TypeAlias = "bytes | memoryview | array[int]"


def block_of_rows(turn: Turn, count: int, stride: int) -> "array[int]":
    """Memory for rows `stride` bytes apart, in the form in which they are turned fastest."""
    kind = _ITEMS[turn.item_bytes]
    return array(kind, [0]) * (count * stride // turn.item_bytes)


def turned(
    data: Rows,
    turn: Turn,
    count: int,
    column: int,
    *,
    stride: int | None = None,
    into: memoryview | None = None,
) -> memoryview:
    """Columns of `count` rows in `data`, one after the other.

    `column` is the first one's byte. Rows are `stride` bytes apart, or as in the source. `into` is
    where they go, of exactly their size; a new buffer if it is not given.
    """
    found = memoryview(bytearray(count * turn.row_bytes)) if into is None else into
    stride = turn.source_stride if stride is None else stride
    numpy = _numpy() if count * turn.row_bytes >= _WORTH_NUMPY else None
    item = turn.item_bytes
    columns = turn.row_bytes // item
    if numpy is None:
        _by_columns(data, turn, count, column, stride, found)
        return found
    rows = numpy.ndarray(
        (count, columns), f"u{item}", buffer=data, offset=column, strides=(stride, item)
    )
    lines = numpy.ndarray((columns, count), f"u{item}", buffer=found)
    for i in range(0, count, _TILE_ROWS):
        for j in range(0, columns, _TILE_COLUMNS):
            tile = rows[i : i + _TILE_ROWS, j : j + _TILE_COLUMNS]
            lines[j : j + _TILE_COLUMNS, i : i + _TILE_ROWS] = tile.T
    return found


def _by_columns(
    data: Rows, turn: Turn, count: int, column: int, stride: int, found: memoryview
) -> None:
    item, kind = turn.item_bytes, _ITEMS[turn.item_bytes]
    if isinstance(data, array):
        source, first = data, column // item
    else:
        # Slices of an array are several times as fast as those of a memoryview.
        source, first = array(kind), 0
        source.frombytes(memoryview(data)[column : column + (count - 1) * stride + turn.row_bytes])
    lines, step = found.cast(kind), stride // item
    for i in range(turn.row_bytes // item):
        at = first + i
        lines[i * count : (i + 1) * count] = source[at : at + (count - 1) * step + 1 : step]


@cache
def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy
