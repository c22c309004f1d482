"""What one rank has written so far, so that work can go on after a kill.

Each line names a tensor that is complete, with its checksum. It proves nothing by itself: who goes
on hashes the bytes again, and does again what is not as noted. So nothing need be synchronized, and
a torn last line does no harm.
"""

import errno
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tightfit.errors import OutputError
from tightfit.sharding.differing import refuse_other
from tightfit.sharding.job import Job
from tightfit.sharding.origin import States
from tightfit.sharding.regular import open_regular

_CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Journal:
    """The open journal of a rank, locked against other processes.

    `noted` are checksums by part and tensor that an earlier process has left for the same source.

    Raises:
        OutputError: another process writes this rank, or has begun it and `resume` is not set.
    """

    def __init__(self, path: Path, rank: int, job: Job, sources: States, *, resume: bool) -> None:
        self.path = path
        self.noted: dict[tuple[str, str], str] = {}
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._fd = -1
        mine = False
        try:
            while True:
                self._fd = open_regular(self.path, flags)
                self._lock(rank, path.parent)
                status = os.fstat(self._fd)
                if status.st_nlink:
                    break
                # Its owner finished between opening and locking.
                os.close(self._fd)
            mine = status.st_size == 0
            if not mine and not resume:
                raise OutputError(
                    f"rank {rank} in {path.parent} was begun by another run",
                    hint=f"--resume continues it; or remove {self.path.name} and its files",
                )
            self._begin(job, sources, status.st_size)
        except BaseException:
            self.close(remove=mine and not resume)
            raise

    def _begin(self, job: Job, sources: States, size: int) -> None:
        lines = self._lines(size)
        head = lines[0] if lines else None
        if size and not (isinstance(head, dict) and isinstance(head.get("job"), dict)):
            raise OutputError(
                f"{self.path} is damaged, or no journal of tightfit",
                hint="remove it; then --resume writes what it spoke of again",
            )
        if head is not None and (difference := job.difference(head["job"])) is not None:
            refuse_other(self.path.parent, difference)
        if head is None or not _same_sources(head.get("sources"), sources):
            lines, first = [], {"job": dict(job.identity), "sources": dict(sources)}
            os.ftruncate(self._fd, 0)
            os.write(self._fd, _encoded(first))
        for line in lines[1:]:
            if isinstance(line, list) and len(line) == 3 and all(isinstance(w, str) for w in line):
                self.noted[line[0], line[1]] = line[2]

    def note(self, part: str, tensor: str, checksum: str) -> None:
        """A tensor is complete."""
        self._write([part, tensor, checksum])

    def close(self, *, remove: bool) -> None:
        """Unlock it, and leave it only to somebody who is to go on."""
        if self._fd >= 0:
            if remove:
                with suppress(OSError):
                    os.unlink(self.path)
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _lock(self, rank: int, directory: Path) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another process is writing rank {rank} to {directory}",
                hint="wait for it, or give each process ranks of its own (--ranks)",
            ) from None
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                raise

    def _lines(self, size: int) -> list[Any]:
        data = os.pread(self._fd, size, 0)
        found: list[Any] = []
        for line in data.split(b"\n"):
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError):
                # Torn by the kill; what follows was appended after it.
                if not found:
                    return []
        return found

    def _write(self, line: object) -> None:
        # A line of its own even after a torn one.
        os.write(self._fd, b"\n" + _encoded(line))


def _encoded(line: object) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _same_sources(noted: object, now: States) -> bool:
    if not isinstance(noted, dict):
        return False
    return all(noted.get(file, state) == state for file, state in now.items())
