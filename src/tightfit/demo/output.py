"""Output that is either whole or not there.

Every file is written as `<name>.partial` and gets its name only when all files are complete and on
disk, in the order in which they were created: a config that was created last vouches for the rest.
Whatever stops the work before that, the directory is left as it was found.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tightfit.checkpoint.disk import is_about, output_error, reserve, sync_directory
from tightfit.checkpoint.source import safe_name
from tightfit.errors import OutputError


@dataclass(slots=True, kw_only=True)
class PartFile:
    """A file that is being written.

    `fd` is open for reading and writing (`os.pwrite`, `os.copy_file_range`) until `close`, and
    `path` is where its bytes are now: it changes when the directory is committed. The file has its
    full size `nbytes` from the start.
    """

    name: str
    path: Path
    nbytes: int
    fd: int = -1

    def close(self) -> None:
        """Give the file descriptor back before the commit, when many files are written."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


class OutputDirectory:
    """A new directory of files that appears whole, or not at all.

    Use it as a context manager and call `commit` at the end. Without it, or after an exception,
    everything that was created is removed, and nothing else.

    Raises:
        OutputError: on entering, if the path is a file or a directory that is not empty; later, if
            the disk is full, or the file system does not let us write.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._parts: list[PartFile] = []
        self._directories: list[Path] = []
        self._renaming = False
        self._committed = False

    def __enter__(self) -> Self:
        path = self.path
        try:
            with self._errors(path, 0):
                if path.exists() and not path.is_dir():
                    raise OutputError(
                        f"the output {path} is an existing file", hint="give a new directory"
                    )
                if path.is_dir() and any(path.iterdir()):
                    raise OutputError(
                        f"the output directory {path} is not empty",
                        hint="give a new directory, or remove that one yourself",
                    )
                self._make_directories(path)
        except BaseException:
            self._remove_all()
            raise
        return self

    def create(self, name: str, nbytes: int) -> PartFile:
        """Create a file of `nbytes` bytes, reserved on disk where the file system can.

        Raises:
            OutputError: there is no space, or it cannot be written.
        """
        final = self.path / safe_name(name, "the output")
        part = PartFile(name=name, path=final.with_name(final.name + ".partial"), nbytes=nbytes)
        with self._errors(final, nbytes):
            self._make_directories(final.parent)
            # Noted before it exists, so that no interruption can leave it behind.
            self._parts.append(part)
            try:
                # 0666, which the umask restricts: safetensors' own writer makes files that only
                # their owner can read, and servers run as other users.
                part.fd = os.open(
                    part.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
                )
            except FileExistsError:
                self._parts.remove(part)
                raise
            reserve(part.fd, nbytes)
        return part

    def write_text(self, name: str, text: str) -> None:
        """Write a whole UTF-8 file."""
        data = memoryview(text.encode())
        part = self.create(name, len(data))
        with self._errors(self.path / name, len(data)):
            _write_all(part.fd, data)
        part.close()

    def commit(self) -> None:
        """Bring everything to disk, then give all files their names, in the order of creation.

        Raises:
            OutputError: something cannot be written, or another process has made a file of the
                same name meanwhile.
        """
        assert not self._committed, "commit() twice"
        with self._errors(self.path, 0):
            for part in self._parts:
                if part.fd < 0:
                    part.fd = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
                os.fsync(part.fd)
                part.close()
            self._renaming = True
            for part in self._parts:
                final = self.path / part.name
                if os.path.lexists(final):
                    raise OutputError(
                        f"{final} has appeared while the output was written",
                        hint="let one process at a time write to a directory",
                    )
                os.rename(part.path, final)
                part.path = final
            for directory in {self.path, *((self.path / p.name).parent for p in self._parts)}:
                sync_directory(directory)
        self._committed = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._committed:
            return
        self._remove_all()
        if isinstance(error, OSError) and is_about(error, self.path):
            raise output_error(error, self.path, 0) from error

    def _make_directories(self, path: Path) -> None:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        for directory in reversed(missing):
            self._directories.append(directory)
            try:
                os.mkdir(directory)
            except FileExistsError:
                self._directories.remove(directory)

    def _remove_all(self) -> None:
        for part in self._parts:
            with suppress(OSError):
                part.close()
            if self._renaming and not os.path.lexists(part.path):
                # The interruption fell between a rename and its note.
                part.path = self.path / part.name
            with suppress(OSError):
                os.unlink(part.path)
        for directory in reversed(self._directories):
            with suppress(OSError):
                os.rmdir(directory)
        self._parts.clear()
        self._directories.clear()

    @contextmanager
    def _errors(self, path: Path, nbytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise output_error(e, path, nbytes) from e


def _write_all(fd: int, data: memoryview) -> None:
    offset = 0
    while offset < len(data):
        offset += os.pwrite(fd, data[offset:], offset)
