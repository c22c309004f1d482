"""Disks: room on them, and what their errors mean for a user."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from tightfit.errors import OutputError
from tightfit.units import format_bytes

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_WRITE_ERRORS = (*_NO_SPACE, errno.EFBIG, errno.EROFS)


def check_free_space(path: str | os.PathLike[str], needed_bytes: int) -> None:
    """Check, before any work, that the file system of `path` has room; `path` need not exist.

    Raises:
        OutputError: it has not.
    """
    free = _free_bytes(Path(path))
    if free is not None and free < needed_bytes:
        raise OutputError(
            f"{os.fspath(path)} needs {format_bytes(needed_bytes)}, and its file system has "
            f"{format_bytes(free)} free",
            hint="free some space, or write to another disk",
        )


def _free_bytes(path: Path) -> int | None:
    for existing in (path.absolute(), *path.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(existing).free
    return None


def is_about(error: OSError, directory: Path) -> bool:
    """Whether an error of the system is about what is written to a directory."""
    if error.errno in _WRITE_ERRORS:
        return True
    name = error.filename
    return isinstance(name, str) and Path(name).is_relative_to(directory)


def reserve(fd: int, nbytes: int) -> None:
    """Give a file its size, on disk where the file system can."""
    if nbytes == 0:
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, nbytes)


def sync_directory(path: Path) -> None:
    """Bring the names of a directory to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        # Some network file systems cannot sync a directory, and need not.
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)


def output_error(
    error: OSError, path: Path, nbytes: int, *, left: str = "nothing was left behind"
) -> OutputError:
    """What a user can do about an error of the system; `left` says what is there now."""
    if error.errno in _NO_SPACE:
        free = _free_bytes(path)
        needs = f": it needs {format_bytes(nbytes)}" if nbytes else ""
        has = f" ({format_bytes(free)} free)" if free is not None else ""
        what = "the disk quota is used up" if error.errno == errno.EDQUOT else "no space left"
        return OutputError(
            f"cannot write {path}{needs}, and {what}{has}" if needs else f"{path}: {what}{has}",
            hint=f"free some space, or write to another disk; {left}",
        )
    if error.errno == errno.EFBIG:
        return OutputError(
            f"cannot write {path}: {format_bytes(nbytes)} is more than a file may have here"
            if nbytes
            else f"cannot write {path}: the file is larger than allowed here",
            hint="write smaller files (--max-shard-size), or raise the limit (ulimit -f)",
        )
    return OutputError(
        f"cannot write {path}: {error.strerror or error}",
        hint="check the permissions of the directory, or write elsewhere",
    )
