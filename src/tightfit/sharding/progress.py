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
    done = 0
    while done < nbytes:
        data = os.pread(fd, min(_BLOCK_BYTES, nbytes - done), offset + done)
        if not data:
            break
        digest.update(data)
        done += len(data)
        advance(len(data))
    return digest.hexdigest()
