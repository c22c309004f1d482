"""Where a calibration keeps its files, and how nobody else's files get lost there.

A directory is used only if it is new, empty or, to go on, full of files of the same kind; and of
its files only those that a calibration makes are removed.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

import xxhash

from tightfit.checkpoint.disk import output_error
from tightfit.checkpoint.source import is_remote, local_path_of
from tightfit.demo.cache import cache_directory
from tightfit.errors import OutputError

LAYERS = re.compile(r"(calibration\.json|(layer|hidden)-\d{5,}\.safetensors)(\.partial)?")
"""What our own calibration makes."""
OPTIMUM = re.compile(r"optimum\.safetensors(\.partial)?")
"""What is kept of optimum's."""


class RefusedDirectoryError(OutputError):
    """A directory that is not to be used: its files are somebody else's, or of other work."""


def directory_for(out: str) -> Path:
    """Where to calibrate for an output: beside it, as only files that belong to it may be in it.

    For a URL it is in the user's cache, which nobody else can write to.

    Raises:
        OutputError: there is no cache, or it cannot be written.
    """
    if not is_remote(out):
        path = Path(os.path.abspath(local_path_of(out)))
        return path.parent / f"{path.name}.calibration"
    parent = cache_directory() / "calibration"
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, parent, 0) from error
    return parent / xxhash.xxh3_128(out.encode()).hexdigest()


def require_own(directory: Path, own: re.Pattern[str], *, resume: bool) -> None:
    """Refuse a directory whose files are not ours to replace; it need not exist.

    Raises:
        RefusedDirectoryError: it is not empty, and without `resume`, or has other files than `own`.
        OutputError: it cannot be read.
    """
    names = [path.name for path in _entries(directory)]
    if names and not resume:
        raise RefusedDirectoryError(
            f"the calibration directory {directory} is not empty",
            hint="--resume continues a calibration; or remove that directory yourself",
        )
    if not all(map(own.fullmatch, names)):
        raise RefusedDirectoryError(
            f"{directory} has files that are not of a calibration",
            hint="remove it yourself, or give another output",
        )


def remove_own(directory: Path, own: re.Pattern[str]) -> None:
    """Remove what a calibration has made, and the directory unless it holds something else."""
    with suppress(OSError, OutputError):
        for path in _entries(directory):
            if own.fullmatch(path.name):
                path.unlink()
        directory.rmdir()


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise output_error(error, directory, 0) from error
