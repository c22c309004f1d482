"""A directory on a store that takes whole files only: S3, Google, Azure, or whatever fsspec knows.

A file appears when all of its bytes have come; until then its upload can be given up, and leaves
nothing. Large files go up in blocks (multipart uploads, where the store has them).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from tightfit.checkpoint.remote_source import FsspecSource
from tightfit.checkpoint.source import safe_name
from tightfit.checkpoint.store import Trouble, told
from tightfit.errors import OutputError

BLOCK_BYTES = 5 * 2**20
_MOST_BLOCKS = 9_000
"""S3 takes 10,000 blocks of a file."""
_WITHOUT_DIRECTORIES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss")


class Sink(Protocol):
    """What the bytes of a file are written to, in order."""

    def write(self, data: memoryview, /) -> object:
        """Take all of them."""


class RemoteDirectory:
    """A place on a store, for reading and writing.

    Raises:
        MissingExtraError: the protocol needs s3fs.
        ConfigError: the protocol is unknown, needs another package, or cannot be reached.
        OutputError: it is for reading only.
    """

    def __init__(self, url: str) -> None:
        self.label = url.rstrip("/")
        if url.startswith(("http://", "https://")):
            raise OutputError(
                f"nothing can be written to {self.label}: web servers are for reading",
                hint="give a directory, or the address of a store (s3://, gs://, abfs://)",
            )
        self.source = FsspecSource(url)
        self._fs, self._root = self.source.place
        self._protocol = url.split("://")[0].rsplit("::")[-1]

    def names(self) -> set[str]:
        """What is there; nothing if the place does not exist yet."""
        self._fs.invalidate_cache()
        return set(self.source.files())

    def prepare(self) -> None:
        """Make the directory, where the store has such things."""
        if self._protocol not in _WITHOUT_DIRECTORIES:
            with self.errors("."):
                self._fs.makedirs(self._root, exist_ok=True)

    def read(self, name: str) -> bytes:
        """All of a small file."""
        return self.source.read(name)

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        """A small file, which appears whole.

        Raises:
            OutputError: it cannot be written.
        """
        from tightfit.checkpoint.store import retrying

        data = b"".join(blocks)
        with self.errors(name):
            retrying(lambda: self._fs.pipe_file(self._join(name), data))
        self.source.forget(name)

    @contextmanager
    def open(self, name: str, nbytes: int) -> Iterator[Sink]:
        """A file of `nbytes` bytes that appears at the end of the block, or not at all."""
        size = max(BLOCK_BYTES, -(-nbytes // _MOST_BLOCKS))
        file = self._fs.open(self._join(name), "wb", block_size=size, autocommit=False)
        try:
            yield file
            file.close()
            file.commit()
        except BaseException:
            _give_up(file)
            raise
        finally:
            self.source.forget(name)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; what cannot be removed stays."""
        for name in names:
            with suppress(Exception):
                self._fs.rm_file(self._join(name))
            self.source.forget(name)

    def give_up_uploads(self, names: Iterable[str]) -> int:
        """End uploads of these files that a kill has left behind; they cost what they hold.

        Returns:
            How many there were, as far as the store tells.
        """
        if not hasattr(self._fs, "call_s3"):
            return 0
        bucket, _, prefix = self._root.partition("/")
        wanted = {f"{prefix}/{name}".lstrip("/") for name in names}
        count = 0
        # Not everybody who may write may list uploads.
        with suppress(Exception):
            listing = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
            for upload in listing.get("Uploads", ()):
                if upload["Key"] in wanted:
                    self._fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])
                    count += 1
        return count

    @contextmanager
    def errors(self, name: str, safe: Callable[[], str] | None = None) -> Iterator[None]:
        """Turn errors of the store into one line; `safe` says what is there already."""

        def tell(error: Exception, trouble: Trouble) -> OutputError:
            reason = trouble.reason
            if isinstance(error, NotImplementedError):
                reason = f"{self._protocol}:// is for reading only"
            hint = trouble.hint if safe is None else f"{trouble.hint}; {safe()}"
            return OutputError(f"cannot write {name!r} to {self.label}: {reason}", hint=hint)

        with told(self.label, tell):
            yield

    def _join(self, name: str) -> str:
        return f"{self._root}/{safe_name(name, self.label)}"


def encoded(*lines: Mapping[str, Any]) -> bytes:
    """JSON documents, one a line."""
    return b"\n".join(json.dumps(line, separators=(",", ":")).encode() for line in lines)


def _give_up(file: Any) -> None:
    with suppress(Exception):
        file.discard()
    # Else its destructor would complete what was begun.
    with suppress(AttributeError):
        file.closed = True
