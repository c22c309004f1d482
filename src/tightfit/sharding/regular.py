"""Small files of ours in directories where others write too: never through a link, and no pipes."""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from tightfit.errors import OutputError


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file.

    Raises:
        OutputError: it is a link, a pipe or anything else.
        OSError: it cannot be opened.
    """
    # Without O_NONBLOCK opening a pipe waits for whoever is at its other end.
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _not_regular(path) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_regular(path)
    return fd


def read_regular(path: Path, most_bytes: int) -> bytes:
    """What a regular file begins with; raises as `open_regular`."""
    with open(open_regular(path), "rb") as file:
        return file.read(most_bytes)


def holds(path: Path, blocks: Iterable[bytes]) -> bool | None:
    """Whether a regular file is made of these blocks; None if there is none.

    Raises:
        OutputError, OSError: as `open_regular`.
    """
    try:
        fd = open_regular(path)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        return all(file.read(len(block)) == block for block in blocks) and not file.read(1)


def _not_regular(path: Path) -> OutputError:
    return OutputError(f"{path} is not a regular file", hint="remove it, or give a new directory")
