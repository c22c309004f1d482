"""Where a checkpoint's files are: a directory, or a distant place (`remote_source`).

A source gives sizes and byte ranges by file name, and knows nothing about models. File names come
from indexes and headers that strangers wrote, so a name that could leave the directory is refused
by every source, and a local one also refuses symlinks that lead out of it.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tightfit.errors import CheckpointError, ConfigError

_LOCAL = ("file://", "local://")


class Source(Protocol):
    """A flat place with files; `path` is always relative to it."""

    label: str
    """What messages call the place."""

    def exists(self, path: str) -> bool:
        """Whether there is a readable regular file."""
        ...

    def size(self, path: str) -> int:
        """Bytes of the file."""
        ...

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` to `stop`, or to the end; fewer if the file is shorter."""
        ...

    def files(self) -> list[str]:
        """Names of the files at the top level, sorted."""
        ...

    def others(self) -> list[str]:
        """What else is there, sorted: directories (`name/`), and links that lead nowhere."""
        ...

    def local_path(self, path: str) -> Path | None:
        """The file as a local one, for in-kernel copies and mmap; None where it is remote."""
        ...

    def state(self, path: str) -> list[int | str]:
        """What changes when somebody writes the file anew."""
        ...


def is_remote(place: str) -> bool:
    """Whether a user means a place that only fsspec can open."""
    return "://" in place and not place.startswith(_LOCAL)


def local_path_of(place: str) -> Path:
    """The path of a place that is not remote, however it is spelled."""
    for prefix in _LOCAL:
        place = place.removeprefix(prefix)
    return Path(place)


def open_source(place: str) -> Source:
    """A directory, local or distant.

    Raises:
        ConfigError: there is no such directory, or it cannot be reached.
        MissingExtraError: the protocol needs s3fs.
    """
    if is_remote(place):
        from tightfit.checkpoint.remote_source import FsspecSource

        return FsspecSource(place)
    return LocalSource(local_path_of(place), place)


def safe_name(name: str, where: str) -> str:
    """Return `name` if it is a plain relative file name that stays in its directory.

    Raises:
        CheckpointError: it is empty or absolute, has `..`, a backslash, NUL or a drive letter.
            `where` says which file it came from.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if (
        not all(part not in ("", ".", "..") for part in parts)
        or not parts
        or any(c in name for c in "\\\0")
        or re.match(r"[A-Za-z]:", name)
    ):
        raise CheckpointError(
            f"{where} names the file {name!r}, which is not a plain name inside the checkpoint",
            hint="do not use this checkpoint: a correct one never names files outside itself",
        )
    return name


class LocalSource:
    """A local directory, which may be a snapshot in a Hugging Face cache.

    Raises:
        ConfigError: there is no such directory.
    """

    def __init__(self, directory: str | os.PathLike[str], label: str | None = None) -> None:
        self.directory = Path(directory)
        self.label = label or str(directory)
        if not os.path.isdir(self.directory):
            raise ConfigError(
                f"there is no directory {self.label}", hint="check the path for typing mistakes"
            )
        root = Path(os.path.realpath(self.directory))
        self._roots = [root]
        # A snapshot is a directory of symlinks to blobs: <cache>/models--a--b/snapshots/<revision>
        # -> ../../blobs/<hash>, which may in turn point into <cache>/blobs, shared by all models.
        repo = root.parent.parent
        if root.parent.name == "snapshots" and "--" in repo.name:
            self._roots += [repo / "blobs", repo.parent / "blobs"]

    def __getstate__(self) -> dict[str, Any]:
        """The same for processes with other working directories."""
        return {**vars(self), "directory": Path(os.path.abspath(self.directory))}

    def exists(self, path: str) -> bool:
        """Whether there is a readable regular file; a link that leads nowhere is none."""
        return os.path.isfile(self._resolve(path))

    def size(self, path: str) -> int:
        """Bytes of the file."""
        with self._errors(path):
            return os.stat(self._resolve(path)).st_size

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` to `stop`, or to the end; fewer if the file is shorter."""
        with self._errors(path), open(self._resolve(path), "rb") as f:
            f.seek(start)
            return f.read() if stop is None else f.read(stop - start)

    def files(self) -> list[str]:
        """Names of the files at the top level, sorted."""
        with self._errors("."):
            return sorted(entry.name for entry in os.scandir(self.directory) if entry.is_file())

    def others(self) -> list[str]:
        """What else is there, sorted: directories (`name/`), and links that lead nowhere."""
        with self._errors("."):
            entries = [entry for entry in os.scandir(self.directory) if not entry.is_file()]
            return sorted(
                f"{entry.name}/" if entry.is_dir() else entry.name
                for entry in entries
                if entry.is_dir() or entry.is_symlink()
            )

    def local_path(self, path: str) -> Path:
        """The real file behind the name."""
        return self._resolve(path)

    def state(self, path: str) -> list[int | str]:
        """What changes when somebody writes the file: its size, and its time of modification."""
        with self._errors(path):
            status = os.stat(self._resolve(path))
        return [status.st_size, status.st_mtime_ns]

    def _resolve(self, path: str) -> Path:
        real = Path(os.path.realpath(self.directory / safe_name(path, self.label)))
        if not any(real.is_relative_to(root) for root in self._roots):
            raise CheckpointError(
                f"{path!r} in {self.label} is a link that leads out of the directory, to {real}",
                hint="copy the file into the directory if you trust it",
            )
        return real

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as e:
            raise CheckpointError(
                f"there is no file {path!r} in {self.label}", hint="download the missing file"
            ) from e
        except OSError as e:
            raise CheckpointError(
                f"cannot read {path!r} in {self.label}: {e.strerror or e}",
                hint="check the permissions of the file and the health of the disk",
            ) from e
