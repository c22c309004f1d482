"""Where a checkpoint's files are: a directory, or anything that fsspec can open.

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

from tightfit.errors import CheckpointError, ConfigError, MissingExtraError, TightfitError


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

    def local_path(self, path: str) -> Path | None:
        """The file as a local one, for in-kernel copies and mmap; None where it is remote."""
        ...


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
        if not self.directory.is_dir():
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

    def local_path(self, path: str) -> Path:
        """The real file behind the name."""
        return self._resolve(path)

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


class FsspecSource:
    """A directory on anything that fsspec can open: `s3://`, `gs://`, `https://`, `memory://`.

    Raises:
        MissingExtraError: the protocol needs s3fs.
        ConfigError: the protocol is unknown, needs another package, or cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.label = url.rstrip("/")
        self._protocol = url.split("://")[0].rsplit("::")[-1]
        # Imported here because it costs the start of every command for the few that use a URL.
        from fsspec.core import url_to_fs

        try:
            self._fs, root = url_to_fs(url)
        except ImportError as e:
            raise self._missing_package(e) from e
        except Exception as e:
            raise ConfigError(
                f"cannot open {url}: {_first_line(e)}",
                hint="give a local directory, a Hub id, or an s3://, gs:// or https:// address",
            ) from e
        self._root = str(root).rstrip("/")

    def exists(self, path: str) -> bool:
        """Whether there is a file."""
        with self._errors(path):
            return bool(self._fs.isfile(self._join(path)))

    def size(self, path: str) -> int:
        """Bytes of the file."""
        with self._errors(path):
            size = self._fs.info(self._join(path)).get("size")
        if size is None:
            raise CheckpointError(
                f"the server of {self.label} does not say how long {path!r} is",
                hint="download the checkpoint and give its directory",
            )
        return int(size)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` to `stop`, or to the end; fewer if the file is shorter."""
        if start == stop:
            return b""
        with self._errors(path):
            data: bytes = self._fs.cat_file(self._join(path), start=start, end=stop)
        if stop is not None and len(data) > stop - start:
            raise CheckpointError(
                f"the server of {self.label} ignores byte ranges: it sent {len(data)} bytes of "
                f"{path!r} instead of {stop - start}",
                hint="download the checkpoint and give its directory",
            )
        return data

    def files(self) -> list[str]:
        """Names of the files at the top level, sorted; none where a web server lists none."""
        with self._errors("."):
            try:
                listing: list[dict[str, Any]] = self._fs.ls(self._root, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(
            entry["name"].rsplit("/", 1)[-1] for entry in listing if entry["type"] == "file"
        )

    def local_path(self, path: str) -> None:
        """None: the bytes are elsewhere."""
        return

    def _join(self, path: str) -> str:
        return f"{self._root}/{safe_name(path, self.label)}"

    def _missing_package(self, error: ImportError) -> TightfitError:
        if self._protocol in ("s3", "s3a"):
            return MissingExtraError(f"... {self.label}", "s3", "s3fs")
        packages = {"gs": "gcsfs", "gcs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}
        package = packages.get(self._protocol)
        return ConfigError(
            f"cannot open {self.label}: {_first_line(error)}",
            hint=f"pip install {package}" if package else "install the package that it names",
        )

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        # Every fsspec backend brings errors of its own library (botocore, aiohttp, ...), without a
        # common base, so all are turned into one line here.
        try:
            yield
        except TightfitError:
            raise
        except FileNotFoundError as e:
            raise CheckpointError(
                f"there is no file {path!r} in {self.label}",
                hint="check the address for typing mistakes",
            ) from e
        except ImportError as e:
            raise self._missing_package(e) from e
        except Exception as e:
            raise CheckpointError(
                f"cannot read {path!r} in {self.label}: {_first_line(e)}",
                hint="check the address, your credentials and the network",
            ) from e


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
