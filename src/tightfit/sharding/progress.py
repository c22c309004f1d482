"""How far a job is, and the checksums that prove what it has done."""

import os
from collections.abc import Callable
from typing import Protocol

import xxhash

_BLOCK_BYTES = 2**20


class Progress(Protocol):
    """Told how far a job is: `phase` with its total in bytes, then `advance` by bytes."""

    def phase(self, name: str, total_bytes: int) -> None:
        """A new phase begins."""

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""


def checksum(fd: int, offset: int, nbytes: int, advance: Callable[[int], None]) -> str:
    """The 128-bit XXH3 of a range of a file; of what is there, if the file is shorter."""
    digest = xxhash.xxh3_128()
    hash_range(digest, fd, offset, nbytes, advance)
    return digest.hexdigest()


def hash_range(
    digest: xxhash.xxh3_128, fd: int, offset: int, nbytes: int, advance: Callable[[int], None]
) -> None:
    """Hash a range of a file, or what is there of it."""
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, nbytes)))
    done = 0
    while done < nbytes:
        got = os.preadv(fd, [buffer[: nbytes - done]], offset + done)
        if not got:
            break
        digest.update(buffer[:got])
        done += got
        advance(got)
