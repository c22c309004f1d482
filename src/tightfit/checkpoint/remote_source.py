"""Checkpoints that are elsewhere: on anything that fsspec can open, range by range."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

from tightfit.checkpoint.source import safe_name
from tightfit.checkpoint.store import (
    ATTEMPTS,
    RangesIgnoredError,
    ShortReadError,
    Trouble,
    diagnose,
    open_store,
    retrying,
    told,
)
from tightfit.errors import CheckpointError

_RANGE_BYTES = 2**21
_AT_A_TIME = 8

_STATE_KEYS = (
    *("ETag", "etag", "md5Hash", "content_md5", "crc32c", "generation", "mtime"),
    *("LastModified", "last_modified", "Last-Modified", "modified", "created"),
)
"""What stores call that which changes with a file."""

_USUAL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json"),
    *("processor_config.json", "video_preprocessor_config.json", "hf_quant_config.json"),
)


class FsspecSource:
    """A directory on anything that fsspec can open: `s3://`, `gs://`, `https://`, `memory://`.

    What passes by itself, as an overloaded server or a broken connection, is tried again; long
    reads are split into ranges that are fetched at the same time.

    Raises:
        MissingExtraError: the protocol needs s3fs.
        ConfigError: the protocol is unknown, needs another package, or cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.label = url.rstrip("/")
        self._fs, self._root = open_store(url)
        self._is_http = url.startswith(("http://", "https://"))
        self._infos: dict[str, dict[str, Any] | None] = {}
        self._readable = False
        # Other file systems of fsspec than those need not bear two calls at a time.
        self._lock = nullcontext() if getattr(self._fs, "async_impl", False) else Lock()

    def exists(self, path: str) -> bool:
        """Whether there is a file.

        Some stores deny access to what is not there: once something could be read, that counts
        as missing.
        """
        info = self._info(path)
        return info is not None and info.get("type") == "file"

    def size(self, path: str) -> int:
        """Bytes of the file."""
        info = self._info(path)
        if info is None:
            raise self._no_file(path)
        size = info.get("size")
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
        name = self._join(path)
        if stop is None:
            return self._range(path, name, start, stop)
        return by_ranges(lambda a, b: self._range(path, name, a, b), start, stop)

    def files(self) -> list[str]:
        """Names of the files at the top level, sorted.

        Of a web server that lists nothing, those that models usually have beside their weights.
        """
        found = self._names("file")
        if found is None:
            return self._usual_files()
        # Of stores that mark directories by an empty object.
        return sorted(name for name in found if name)

    def others(self) -> list[str]:
        """What else is there, sorted: directories (`name/`), if the server lists them."""
        found = self._names("directory") or []
        return sorted(f"{name}/" for name in found if name)

    def _names(self, kind: str) -> list[str] | None:
        """Names of one type of fsspec's at the top level; None of a web server that lists none."""
        # Without the slash web servers send somewhere else.
        place = f"{self._root}/" if self._is_http else self._root

        def listing() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = self._fs.ls(place, detail=True)
            return found

        entries: list[dict[str, Any]] = []
        with self._errors("."):
            try:
                entries = retrying(listing)
            except (FileNotFoundError, NotADirectoryError) as error:
                self._require_place(error)
            except Exception as error:
                if not self._is_http or diagnose(error).kind != "denied":
                    raise
        if self._is_http and not entries:
            return None
        paths = [entry["name"] for entry in entries if entry["type"] == kind]
        if kind == "directory":
            paths = [path.rstrip("/") for path in paths]
        return [path.rsplit("/", 1)[-1] for path in paths]

    def _usual_files(self) -> list[str]:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(max_workers=_AT_A_TIME) as pool:
            there = pool.map(self.exists, _USUAL_FILES)
            return sorted(
                name for name, is_there in zip(_USUAL_FILES, there, strict=True) if is_there
            )

    def local_path(self, path: str) -> None:
        """None: the bytes are elsewhere."""
        return

    @property
    def place(self) -> tuple[Any, str]:
        """The file system of fsspec, and the path in it."""
        return self._fs, self._root

    def forget(self, path: str) -> None:
        """Ask the store again the next time."""
        self._fs.invalidate_cache()
        self._infos.pop(path, None)

    def state(self, path: str) -> list[int | str]:
        """What changes when somebody writes the file anew: its size, and a tag or the time.

        Only the size, where the store says nothing else.
        """
        self.forget(path)
        info = self._info(path)
        if info is None:
            raise self._no_file(path)
        tags = [str(info[key]) for key in _STATE_KEYS if info.get(key)]
        return [self.size(path), *tags[:1]]

    def _info(self, path: str) -> dict[str, Any] | None:
        """What the store says of a file, asked once; None if it is not there."""
        name = self._join(path)
        if path in self._infos:
            return self._infos[path]
        found: dict[str, Any] | None = None
        with self._errors(path):
            try:
                found = retrying(lambda: self._fs.info(name))
                self._readable = True
            except Exception as error:
                trouble = diagnose(error)
                missing = trouble.kind == "missing"
                if missing:
                    self._require_place(error)
                if not missing and not (trouble.kind == "denied" and self._readable):
                    raise
        self._infos[path] = found
        return found

    def _require_place(self, error: Exception) -> None:
        """A bucket that does not exist is not the same as one without a file."""
        if not self._readable and hasattr(self._fs, "call_s3"):
            try:
                self._fs.call_s3("list_objects_v2", Bucket=self._root.split("/")[0], MaxKeys=1)
            except Exception as why:
                if diagnose(why).kind in ("bucket", "expired", "credentials"):
                    raise why from error

    def _range(self, path: str, name: str, start: int, stop: int | None) -> bytes:
        def fetch() -> bytes:
            data = self._fetch(path, name, start, stop)
            if stop is not None and len(data) < stop - start:
                size = self.size(path)
                if start + len(data) < min(stop, size):
                    raise ShortReadError(
                        f"{len(data)} of {min(stop, size) - start} bytes came from byte {start} on"
                    )
            return data

        with self._errors(path):
            return retrying(fetch)

    def _fetch(self, path: str, name: str, start: int, stop: int | None) -> bytes:
        if self._is_http:
            from fsspec.asyn import sync

            found: bytes = sync(self._fs.loop, _http_range, self._fs, name, start, stop)
            return found
        with self._lock:
            data: bytes = self._fs.cat_file(name, start=start, end=stop)
        if stop is not None and len(data) > stop - start:
            raise RangesIgnoredError(
                f"the server ignores byte ranges: it sent {len(data)} bytes instead of "
                f"{stop - start}"
            )
        return data

    def _join(self, path: str) -> str:
        return f"{self._root}/{safe_name(path, self.label)}"

    def _no_file(self, path: str) -> CheckpointError:
        return CheckpointError(
            f"there is no file {path!r} in {self.label}",
            hint="check the address for typing mistakes",
        )

    def _errors(self, path: str) -> AbstractContextManager[None]:
        def tell(_: Exception, trouble: Trouble) -> CheckpointError:
            if trouble.kind == "missing":
                return self._no_file(path)
            tried = f", {ATTEMPTS} times in a row" if trouble.transient else ""
            return CheckpointError(
                f"cannot read {path!r} in {self.label}: {trouble.reason}{tried}",
                hint=trouble.hint,
            )

        return told(self.label, tell)


def by_ranges(fetch: Callable[[int, int], bytes], start: int, stop: int) -> bytes:
    """A long read as several at the same time: one connection alone is slow."""
    if stop - start < 2 * _RANGE_BYTES:
        return fetch(start, stop)
    from concurrent.futures import ThreadPoolExecutor

    ranges = [(at, min(at + _RANGE_BYTES, stop)) for at in range(start, stop, _RANGE_BYTES)]
    with ThreadPoolExecutor(max_workers=min(len(ranges), _AT_A_TIME)) as pool:
        return b"".join(pool.map(lambda one: fetch(*one), ranges))


async def _http_range(fs: Any, url: str, start: int, stop: int | None) -> bytes:
    """A range of a file on a web server; a server that would send all of it is not listened to."""
    session = await fs.set_session()
    options = dict(fs.kwargs)
    last = "" if stop is None else stop - 1
    options["headers"] = {
        **options.get("headers", {}),
        "Range": f"bytes={start}-{last}",
        # Compressed, the range would be of the compressed bytes.
        "Accept-Encoding": "identity",
    }
    async with session.get(fs.encode_url(url), **options) as response:
        if response.status == 416:
            return b""
        fs._raise_not_found_for_status(response, url)
        length = response.content_length
        if response.status != 206 and (
            start > 0 or (stop is not None and (length is None or length > stop))
        ):
            raise RangesIgnoredError(f"the server ignores byte ranges (status {response.status})")
        data: bytes = await response.read()
    if length is not None and len(data) < length:
        raise ShortReadError(f"{len(data)} of {length} bytes came")
    return data
