"""Source files, which are read by ranges, straight to where their bytes are wanted."""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from tightfit.checkpoint.source import Source
from tightfit.errors import CheckpointError

BUFFER_BYTES = 2**23
_MOST_BUFFERS = min(os.sysconf("SC_IOV_MAX") if "SC_IOV_MAX" in os.sysconf_names else 16, 1024)

Batch = tuple[Sequence[memoryview], int]
"""As many buffers as one system call takes, and their bytes together."""


class SourceFiles:
    """The source files of a job: opened once, and checked for change at the end.

    Reads go through a file descriptor where the source is local, and through `Source.read` where it
    is not.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._descriptors: dict[str, int] = {}
        self._states: dict[str, tuple[int, int]] = {}
        self._distant: dict[str, list[int | str]] = {}
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
            if file not in self._distant:
                self._distant[file] = self._source.state(file)
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
            CheckpointError: the file ends before, or its disk fails.
        """
        fd = self.descriptor(file)
        if fd is None:
            data = self._source.read(file, start, stop)
        else:
            try:
                data = os.pread(fd, stop - start, start)
            except OSError as error:
                raise unreadable(file, error) from error
        if len(data) != stop - start:
            raise ended_early(file, start + len(data))
        return data

    def read_into(self, file: str, batches: Iterable[Batch], start: int) -> None:
        """Fill buffers one after the other with the bytes from `start`.

        Raises:
            CheckpointError: the file ends before, or its disk fails.
        """
        fd = self.descriptor(file)
        if fd is None:
            self._fetch(file, batches, start)
            return
        try:
            for buffers, nbytes in batches:
                if (got := os.preadv(fd, buffers, start)) != nbytes:
                    _read_rest(file, fd, list(buffers), got, start)
                start += nbytes
        except OSError as error:
            raise unreadable(file, error) from error

    def _fetch(self, file: str, batches: Iterable[Batch], start: int) -> None:
        """The same from a remote source, in requests that are worth their way."""
        waiting: list[memoryview] = []
        total = 0
        for buffers, nbytes in (*batches, ((), 0)):
            if waiting and (total + nbytes > BUFFER_BYTES or not nbytes):
                data = memoryview(self.read(file, start, start + total))
                start += total
                for buffer in waiting:
                    buffer[:] = data[: len(buffer)]
                    data = data[len(buffer) :]
                waiting, total = [], 0
            waiting += buffers
            total += nbytes

    def check_unchanged(self) -> None:
        """Refuse to vouch for a copy of files that were written to meanwhile.

        Raises:
            CheckpointError: size or modification time of a source file has changed, or what a
                distant store says of it.
        """
        changed = [f for f, fd in self._descriptors.items() if _state(fd) != self._states[f]]
        changed += [f for f, state in self._distant.items() if self._source.state(f) != state]
        if changed:
            raise CheckpointError(
                f"{self._source.label}: {changed[0]!r} changed while it was read",
                hint="wait until nobody writes to the source, then start again",
            )


def batches(buffers: Sequence[memoryview]) -> list[Batch]:
    """Buffers in as few batches as possible."""
    found = []
    for i in range(0, len(buffers), _MOST_BUFFERS):
        batch = buffers[i : i + _MOST_BUFFERS]
        found.append((batch, sum(map(len, batch))))
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


def unreadable(file: str, error: OSError) -> CheckpointError:
    """A disk, or the way to it, that fails while a file is read."""
    return CheckpointError(
        f"cannot read {file}: {error.strerror}",
        hint="its disk or the network that leads to it fails; look at the system's log, and try "
        "again from another copy",
    )


def ended_early(file: str, at: int) -> CheckpointError:
    """A source file that is shorter than its header says; `at` is the first byte that is missed."""
    return CheckpointError(
        f"{file} is truncated: byte {at}, which belongs to a tensor, is missing",
        hint="the file is incomplete or was truncated meanwhile; download it again",
    )


def _read_rest(file: str, fd: int, buffers: list[memoryview], got: int, start: int) -> None:
    while True:
        start += got
        while buffers and got >= len(buffers[0]):
            got -= len(buffers.pop(0))
        if not buffers:
            return
        buffers[0] = buffers[0][got:]
        got = os.preadv(fd, buffers, start)
        if got == 0:
            raise ended_early(file, start)


def _state(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns
