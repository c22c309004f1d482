"""Carry out copies with a few megabytes of memory, every source byte read once."""

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

from tightfit.checkpoint.source import Source
from tightfit.errors import CheckpointError
from tightfit.sharding.copies import Copy, Decay, TensorCopies, Turn
from tightfit.sharding.decay import decay_rates
from tightfit.units import dtype_bytes

BUFFER_BYTES = 2**23
_BLOCKS_OF_TURNS = 4
"""Buffers that a block of a matrix to be turned may fill: long columns make long writes."""
_ITEMS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_MOST_BUFFERS = min(os.sysconf("SC_IOV_MAX") if "SC_IOV_MAX" in os.sysconf_names else 16, 1024)
_NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


class SourceFiles:
    """The source files of a job: opened once, and checked for change at the end.

    Reads go through a file descriptor where the source is local, and through `Source.read` where it
    is not.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._descriptors: dict[str, int] = {}
        self._states: dict[str, tuple[int, int]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "SourceFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def descriptor(self, file: str) -> int | None:
        """A descriptor of a local file; None for a remote one."""
        if file in self._descriptors:
            return self._descriptors[file]
        path = self._source.local_path(file)
        if path is None:
            return None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error.strerror}", hint="check the path and its permissions"
            ) from error
        self._stack.callback(os.close, fd)
        self._descriptors[file] = fd
        self._states[file] = _state(fd)
        return fd

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Exactly the bytes from `start` to `stop`.

        Raises:
            CheckpointError: the file ends before.
        """
        fd = self.descriptor(file)
        if fd is None:
            data = self._source.read(file, start, stop)
        else:
            data = os.pread(fd, stop - start, start)
        if len(data) != stop - start:
            raise ended_early(file, start + len(data))
        return data

    def check_unchanged(self) -> None:
        """Refuse to vouch for a copy of files that were written to meanwhile.

        Raises:
            CheckpointError: size or modification time of a source file has changed.
        """
        for file, fd in self._descriptors.items():
            if _state(fd) != self._states[file]:
                raise CheckpointError(
                    f"{self._source.label}: {file!r} changed while it was read",
                    hint="wait until nobody writes to the source, then start again",
                )


def run_copies(
    groups: Sequence[TensorCopies],
    files: SourceFiles,
    targets: Sequence[int],
    progress: Callable[[int], None],
) -> None:
    """Copy everything; `targets` are the descriptors of the parts, `progress` gets bytes written.

    Raises:
        CheckpointError: a source file ends before its header says so.
        OSError: a target cannot be written.
    """
    for group in groups:
        strided: defaultdict[tuple[int, int, int], list[Copy]] = defaultdict(list)
        for copy in group.copies:
            if copy.rows > 1:
                strided[_rows_of(group, copy)].append(copy)
            else:
                _copy_range(group.source.file, copy, files, targets[copy.target], progress)
        for alike in strided.values():
            _copy_rows(group, alike, files, targets, progress)
        turned: defaultdict[tuple[int, int, int], list[Turn]] = defaultdict(list)
        for turn in group.turns:
            turned[_rows_of(group, turn)].append(turn)
        for turns in turned.values():
            _turn_rows(group, turns, files, targets, progress)
        for decay in group.decays:
            _write_rates(group.source.file, decay, files, targets[decay.target], progress)


def _rows_of(group: TensorCopies, copy: Copy | Turn) -> tuple[int, int, int]:
    """(offset of the first whole row, stride, rows): copies with the same come from one read."""
    if copy.rows == 1:
        return copy.source_offset, copy.row_bytes, 1
    stride = copy.source_stride
    inside = (copy.source_offset - group.source.offset) % stride
    return copy.source_offset - inside, stride, copy.rows


def _copy_range(
    file: str, copy: Copy, files: SourceFiles, target: int, progress: Callable[[int], None]
) -> None:
    source = files.descriptor(file)
    done = 0
    while done < copy.nbytes:
        wanted = min(copy.nbytes - done, 8 * BUFFER_BYTES)
        copied = 0
        if source is not None:
            try:
                copied = os.copy_file_range(
                    source, target, wanted, copy.source_offset + done, copy.target_offset + done
                )
            except OSError as error:
                if error.errno not in _NOT_IN_KERNEL:
                    raise
                source = None
            else:
                if copied == 0:
                    raise ended_early(file, copy.source_offset + done)
        if source is None:
            start = copy.source_offset + done
            data = files.read(file, start, start + min(wanted, BUFFER_BYTES))
            copied = len(data)
            write_all(target, [memoryview(data)], copy.target_offset + done)
        done += copied
        progress(copied)


def _copy_rows(
    group: TensorCopies,
    copies: Sequence[Copy],
    files: SourceFiles,
    targets: Sequence[int],
    progress: Callable[[int], None],
) -> None:
    """Read the rows once, in blocks, and gather every rank's slices from them."""
    base, stride, rows = _rows_of(group, copies[0])
    block = max(1, BUFFER_BYTES // stride)
    for first in range(0, rows, block):
        count = min(block, rows - first)
        start = base + first * stride
        data = memoryview(files.read(group.source.file, start, start + count * stride))
        for copy in copies:
            column = copy.source_offset - base
            slices = [
                data[at : at + copy.row_bytes]
                for at in range(column, column + count * stride, stride)
            ]
            write_all(targets[copy.target], slices, copy.target_offset + first * copy.row_bytes)
            progress(count * copy.row_bytes)


def _turn_rows(
    group: TensorCopies,
    turns: Sequence[Turn],
    files: SourceFiles,
    targets: Sequence[int],
    progress: Callable[[int], None],
) -> None:
    """Read the rows once, in blocks, and write every rank's columns of them as rows."""
    base, stride, rows = _rows_of(group, turns[0])
    block = max(1, _BLOCKS_OF_TURNS * BUFFER_BYTES // stride)
    for first in range(0, rows, block):
        count = min(block, rows - first)
        start = base + first * stride
        data = files.read(group.source.file, start, start + count * stride)
        for turn in turns:
            lines = turned(data, turn, count, turn.source_offset - base)
            width = count * turn.item_bytes
            at = turn.target_offset + first * turn.item_bytes
            if width == turn.target_stride:
                write_all(targets[turn.target], [lines], at)
            else:
                for i in range(len(lines) // width):
                    line = lines[i * width : (i + 1) * width]
                    write_all(targets[turn.target], [line], at + i * turn.target_stride)
            progress(len(lines))


def _write_rates(
    file: str, decay: Decay, files: SourceFiles, target: int, progress: Callable[[int], None]
) -> None:
    size, block = dtype_bytes(decay.dtype), BUFFER_BYTES // 8
    for first in range(0, decay.rows, block):
        count = min(block, decay.rows - first)
        start = decay.source_offset + first * size
        rates = decay_rates(files.read(file, start, start + count * size), decay.dtype)
        write_all(target, [memoryview(rates)], decay.target_offset + 4 * first)
        progress(len(rates))


def turned(data: bytes, turn: Turn, count: int, column: int) -> memoryview:
    """Columns of `count` rows in `data`, one after the other; `column` is the first one's byte."""
    item, kind = turn.item_bytes, _ITEMS[turn.item_bytes]
    source = memoryview(data).cast(kind)
    found = memoryview(bytearray(count * turn.row_bytes))
    lines = found.cast(kind)
    first, step = column // item, turn.source_stride // item
    for i in range(turn.row_bytes // item):
        lines[i * count : (i + 1) * count] = source[first + i : first + i + count * step : step]
    return found


def write_all(fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write buffers one after the other, in as few system calls as possible."""
    for i in range(0, len(buffers), _MOST_BUFFERS):
        batch = list(buffers[i : i + _MOST_BUFFERS])
        while batch:
            written = os.pwritev(fd, batch, offset)
            offset += written
            while batch and written >= len(batch[0]):
                written -= len(batch.pop(0))
            if written:
                batch[0] = batch[0][written:]


def ended_early(file: str, at: int) -> CheckpointError:
    """A source file that is shorter than its header says; `at` is the first byte that is missed."""
    return CheckpointError(
        f"{file} is truncated: byte {at}, which belongs to a tensor, is missing",
        hint="the file is incomplete or was truncated meanwhile; download it again",
    )


def _state(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns
