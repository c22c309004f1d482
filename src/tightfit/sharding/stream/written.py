"""Parts that are being written, and the checksums of their tensors.

What begins at a page goes past the page cache where the file system can do that: it is on disk as
soon as it is written, costs one copy less, and does not push other files out of memory. A tensor
is hashed while it passes by as far as its bytes come in order, and the rest is read again.
"""

import errno
import os
from collections.abc import Callable, Sequence
from threading import Lock

import xxhash

from tightfit.sharding.parts import PAGE_BYTES
from tightfit.sharding.progress import hash_range
from tightfit.sharding.stream.pending import Key, Pending
from tightfit.sharding.stream.source_files import write_all

_WORTH_DIRECT = 2**16
"""Bytes; each direct write waits for the disk."""
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class Stopped(Exception):
    """Nothing more may be written."""


class Target:
    """A part, open for reading and writing as `fd`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._direct = _open_direct(fd)
        self._refused = False

    def write(self, data: memoryview, offset: int, *, aligned: bool) -> None:
        """Write all of it; `aligned` says that it begins at a page of memory."""
        direct = aligned and self._direct >= 0 and offset % PAGE_BYTES == 0 and not self._refused
        while direct and len(data) >= _WORTH_DIRECT:
            try:
                written = os.pwrite(self._direct, data[: len(data) & -PAGE_BYTES], offset)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                # Not closed yet: another thread may be about to use the descriptor.
                self._refused = True
                break
            data, offset = data[written:], offset + written
            direct = written % PAGE_BYTES == 0
        write_all(self.fd, [data], offset)

    def close(self) -> None:
        """Give back what this object has opened; `fd` is the caller's."""
        fd, self._direct = self._direct, -1
        if fd >= 0:
            os.close(fd)


class Writer:
    """Writes what one thread brings, and hashes it.

    Raises:
        Stopped: `stop` has been called. After that nothing is written any more.
        OSError: a part cannot be written.
    """

    def __init__(
        self, targets: Sequence[Target | None], pending: Pending, advance: Callable[[int], None]
    ) -> None:
        self._targets, self._pending, self._advance = targets, pending, advance
        self._hashes: dict[Key, tuple[xxhash.xxh3_128, int]] = {}
        self._lock = Lock()
        self._stopped = False

    def stop(self) -> None:
        """Wait for a write that has begun, and allow no other."""
        with self._lock:
            self._stopped = True

    def put(self, target: int, offset: int, data: memoryview, *, aligned: bool) -> None:
        """Write bytes of one tensor."""
        part = self._target(target)
        with self._lock:
            self._check()
            part.write(data, offset, aligned=aligned)
        key = self._pending.key(target, offset)
        digest, at = self._hashes.get(key) or (
            xxhash.xxh3_128(),
            self._pending.placed(key).offset,
        )
        if offset == at:
            digest.update(data)
            self._hashes[key] = digest, at + len(data)
            self._advance(2 * len(data))
        else:
            self._advance(len(data))

    def put_lines(
        self, target: int, offset: int, stride: int, data: memoryview, nbytes: int
    ) -> None:
        """Write lines of `nbytes`, `stride` apart; they are hashed at the end."""
        fd = self._target(target).fd
        with self._lock:
            self._check()
            for i in range(len(data) // nbytes):
                line = data[i * nbytes : (i + 1) * nbytes]
                if (written := os.pwrite(fd, line, offset)) < nbytes:
                    write_all(fd, [line[written:]], offset + written)
                offset += stride
        self._advance(len(data))

    def checksum(self, key: Key) -> str:
        """The checksum of a tensor that is complete."""
        one = self._pending.placed(key)
        digest, at = self._hashes.get(key) or (xxhash.xxh3_128(), one.offset)
        self._hashes.pop(key, None)
        rest = one.offset + one.tensor.nbytes - at

        def advance(nbytes: int) -> None:
            self._check()
            self._advance(nbytes)

        hash_range(digest, self._target(key[0]).fd, at, rest, advance)
        return digest.hexdigest()

    def _check(self) -> None:
        if self._stopped:
            raise Stopped

    def _target(self, number: int) -> Target:
        target = self._targets[number]
        assert target is not None
        return target


def _open_direct(fd: int) -> int:
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return -1
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | flag)
    except OSError:
        return -1
