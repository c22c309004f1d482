"""The user's cache directory, and how a directory in it comes to be whole or not at all.

A new entry is built beside its final place and renamed at the end, which is atomic. One process at
a time builds: the others wait and find the entry, and whoever holds the lock may remove what a
killed process has left.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tightfit.errors import OutputError

_PARTIAL = ".partial"
_ELSEWHERE = "set TIGHTFIT_CACHE to a directory with room that you can write to"


def cache_directory() -> Path:
    """Where tightfit keeps what it can make again; it need not exist.

    $TIGHTFIT_CACHE, else $XDG_CACHE_HOME/tightfit, else ~/.cache/tightfit (XDG Base Directory
    Specification, which says that relative paths count as unset).

    Raises:
        OutputError: there is no home directory either.
    """
    if own := os.environ.get("TIGHTFIT_CACHE"):
        return Path(own).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "tightfit"
    try:
        return Path.home() / ".cache" / "tightfit"
    except RuntimeError as e:
        raise OutputError("there is no home directory for the cache", hint=_ELSEWHERE) from e


def cached(
    entry: Path,
    *,
    is_whole: Callable[[Path], bool],
    build: Callable[[Path], None],
    progress: Callable[[str], None],
) -> Path:
    """The cache entry, built first if it is not there.

    Args:
        entry: its directory.
        is_whole: whether a directory holds everything; it may not exist.
        build: fills an empty directory; what it leaves beside it is removed afterwards.
        progress: told when another process has to be waited for.

    Raises:
        OutputError: the cache cannot be written.
    """
    if is_whole(entry):
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _lock(entry, progress) as alone:
            if is_whole(entry):
                return entry
            if alone:
                for stale in entry.parent.glob(f"{entry.name}.*{_PARTIAL}"):
                    shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(
                dir=entry.parent, prefix=f"{entry.name}.", suffix=_PARTIAL
            ) as work:
                new = Path(work) / "new"
                new.mkdir()
                build(new)
                _publish(new, entry, is_whole)
    except OutputError as e:
        raise OutputError(e.message, hint=_ELSEWHERE) from e
    except OSError as e:
        reason = e.strerror or e
        raise OutputError(
            f"cannot write the cache {entry.parent}: {reason}", hint=_ELSEWHERE
        ) from e
    return entry


def _publish(new: Path, entry: Path, is_whole: Callable[[Path], bool]) -> None:
    """Rename `new` to `entry`, in the place of one that lacks files."""
    try:
        os.rename(new, entry)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not entry.is_dir():
            raise
        if is_whole(entry):
            return
        os.rename(entry, new.with_name("damaged"))
        os.rename(new, entry)


@contextmanager
def _lock(entry: Path, progress: Callable[[str], None]) -> Iterator[bool]:
    """Hold the entry's lock; False where the file system has none, which costs only double work."""
    with open(entry.with_name(f"{entry.name}.lock"), "ab") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"waiting for another process that is preparing {entry.name}")
                fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
