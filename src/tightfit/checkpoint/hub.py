"""Models on the Hugging Face Hub, without downloading their weights.

`huggingface_hub` does the talking, the caching and the downloading; headers come by range request,
a few kilobytes of each weight file. What is in the local cache is used without any request.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tightfit.checkpoint.files import OTHER_FORMATS, find_weights
from tightfit.checkpoint.remote_source import by_ranges
from tightfit.checkpoint.source import LocalSource, safe_name
from tightfit.errors import CheckpointError, ConfigError, TightfitError

_TIMEOUT_SECONDS = 15.0
_ATTEMPTS = 3
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_BESIDE = re.compile(r"(additional_chat_templates/[^/]+\.jinja|\d+_\w+/config\.json)")
"""Chat templates by name, and the modules of sentence-transformers."""
_NEVER = (".py", ".safetensors", *OTHER_FORMATS)


class HubUnreachableError(ConfigError):
    """The Hub does not answer, or is not to be asked: what is cached is all there is."""


class HubSource:
    """The files of one revision of a model on the Hub.

    Raises:
        ConfigError: there is no such model or revision, or it may not be read.
        HubUnreachableError: the Hub cannot be reached.
    """

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        self.label = repo_id
        self._repo_id = repo_id
        self._revision = revision
        with _errors(repo_id, revision):
            from huggingface_hub import HfApi

            info = HfApi().model_info(
                repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS
            )
        self._commit = info.sha or revision or "main"
        self._sizes = {f.rfilename: f.size for f in info.siblings or ()}

    def exists(self, path: str) -> bool:
        """Whether the revision has the file."""
        return safe_name(path, self.label) in self._sizes

    def size(self, path: str) -> int:
        """Bytes of the file."""
        size = self._sizes.get(safe_name(path, self.label))
        if size is None:
            raise CheckpointError(
                f"there is no file {path!r} in {self.label}, or the Hub does not tell its size",
                hint="check --revision",
            )
        return size

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` to `stop`; small text files come by way of the local cache."""
        safe_name(path, self.label)
        if path.endswith(_TEXT_SUFFIXES):
            with _errors(self._repo_id, self._revision), _no_progress_bars():
                from huggingface_hub import hf_hub_download

                # By the user's name for the revision, so that the cache learns what it means.
                local = hf_hub_download(self._repo_id, path, revision=self._revision)
                return Path(local).read_bytes()[start:stop]
        stop = self.size(path) if stop is None else min(stop, self.size(path))
        if start >= stop:
            return b""
        return by_ranges(lambda a, b: self._read_range(path, a, b), start, stop)

    def files(self) -> list[str]:
        """Names of the files at the top level, sorted."""
        return sorted(name for name in self._sizes if "/" not in name)

    def others(self) -> list[str]:
        """What else is there, sorted: directories (`name/`)."""
        return sorted({f"{name.partition('/')[0]}/" for name in self._sizes if "/" in name})

    def beside(self) -> list[str]:
        """Small files in subdirectories that belong to a model: templates, what pools."""
        return sorted(filter(_BESIDE.fullmatch, self._sizes))

    def local_path(self, path: str) -> None:
        """None: the bytes are elsewhere."""
        return

    def state(self, path: str) -> list[int | str]:
        """The size, and the commit, which never changes."""
        return [self.size(path), self._commit]

    def _read_range(self, path: str, start: int, stop: int) -> bytes:
        from tightfit.checkpoint.store import retrying

        with _errors(self._repo_id, self._revision):
            # The backoff below knows of answers, and nothing of bodies that break off.
            return retrying(lambda: self._fetch(path, start, stop), attempts=_ATTEMPTS)

    def _fetch(self, path: str, start: int, stop: int) -> bytes:
        from huggingface_hub import hf_hub_url

        from tightfit.checkpoint.store import ShortReadError

        utils = _hub_utils()
        url = hf_hub_url(self._repo_id, path, revision=self._commit)
        headers = utils.build_hf_headers(library_name="tightfit")
        # Compressed, the range would be of the compressed bytes.
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with _stream(url, headers) as response:
            utils.hf_raise_for_status(response)
            # A proxy that ignores ranges would send the whole weight file.
            if response.status_code != 206 and (start > 0 or stop < self.size(path)):
                raise CheckpointError(
                    f"{url} ignores byte ranges (status {response.status_code})",
                    hint="check HF_ENDPOINT and your proxy, or download the model first",
                )
            data: bytes = response.read() if hasattr(response, "read") else response.content
        if len(data) < stop - start:
            raise ShortReadError(f"{len(data)} of {stop - start} bytes came")
        return data


def cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """The snapshot of a model in the local cache, whole or not; no request is made."""
    from huggingface_hub import constants

    if repo_id.count("/") > 1 or ".." in repo_id:
        return None
    return resolve_snapshot(
        Path(constants.HF_HUB_CACHE) / ("models--" + repo_id.replace("/", "--")), revision
    )


def resolve_snapshot(repo: Path, revision: str | None) -> Path | None:
    """The directory `snapshots/<commit>` of a cached model; `refs/` knows a branch's commit."""
    revision = revision or "main"
    if ".." in revision.split("/") or os.path.isabs(revision):
        return None
    try:
        commit = (repo / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    snapshot = repo / "snapshots" / commit
    return snapshot if commit and "/" not in commit and os.path.isdir(snapshot) else None


def download(repo_id: str, revision: str | None = None) -> Path:
    """Download what is needed to run a model into the Hub cache, and return its directory.

    That is the config, the tokenizer and the safetensors files that `find_weights` chooses; never
    pickles and never code. Without a connection a whole cached snapshot will do.

    Raises:
        ConfigError: there is no such model or revision, or it may not be read.
        HubUnreachableError: the Hub cannot be reached and the cache lacks files.
    """
    try:
        source = HubSource(repo_id, revision)
    except HubUnreachableError:
        if snapshot := cached_snapshot(repo_id, revision):
            weights = find_weights(LocalSource(snapshot, repo_id))
            if weights.files and not weights.missing:
                return snapshot
        raise
    wanted = [
        name
        for name in source.files()
        if name.endswith(_TEXT_SUFFIXES)
        or (name.startswith("tokenizer") and not name.endswith(_NEVER))
    ]
    wanted += [*source.beside(), *find_weights(source).files]
    with _errors(repo_id, revision):
        import glob

        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=[glob.escape(name) for name in wanted]
            )
        )


@contextmanager
def _stream(url: str, headers: dict[str, str]) -> Iterator[Any]:
    utils = _hub_utils()
    options: dict[str, Any] = {
        "headers": headers,
        "timeout": _TIMEOUT_SECONDS,
        "max_retries": 2,
        "base_wait_time": 0.5,
    }
    if hasattr(utils, "http_stream_backoff"):
        with utils.http_stream_backoff("GET", url, follow_redirects=True, **options) as response:
            yield response
    else:  # huggingface_hub before 1.0, which is built on requests
        with utils.http_backoff("GET", url, stream=True, **options) as response:
            yield response


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    utils = _hub_utils()
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _hub_utils() -> Any:
    """`huggingface_hub.utils`, whose lazy exports a type checker cannot see."""
    from importlib import import_module

    return import_module("huggingface_hub.utils")


@contextmanager
def _errors(repo_id: str, revision: str | None) -> Iterator[None]:
    # huggingface_hub's errors have no common base, and come from httpx or requests by version.
    try:
        yield
    except TightfitError:
        raise
    except Exception as e:
        raise _translate(e, repo_id, revision) from e


def _translate(error: Exception, repo_id: str, revision: str | None) -> TightfitError:
    from huggingface_hub import constants, errors

    # "Not in the cache either" is the end of a story that its cause begins.
    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        return _translate(cause, repo_id, revision)
    hub = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return ConfigError(
            f"{repo_id!r} is neither a local path nor a valid Hub id",
            hint="a Hub id has the form organization/name",
        )
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(
            f"access to {repo_id} is restricted",
            hint=f"ask for access on {hub}/{repo_id}, then set HF_TOKEN or run `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(
            f"{repo_id} has no revision {revision or 'main'!r}",
            hint=f"the branches and tags are listed on {hub}/{repo_id}/tree/main",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(
            f"there is no local path {repo_id} and no model {repo_id} on {hub} that you may see",
            hint="check the spelling; for a private model set HF_TOKEN or run `hf auth login`",
        )
    if status in (401, 403):
        return ConfigError(
            f"{hub} refused access to {repo_id} (status {status})",
            hint="check that HF_TOKEN is valid and has read permission",
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnreachableError(
            f"{repo_id} is neither a local path nor in the local cache, and HF_HUB_OFFLINE forbids "
            "to ask the Hub",
            hint="unset HF_HUB_OFFLINE, or give a local directory",
        )
    if isinstance(error, errors.EntryNotFoundError) and status is not None:
        return CheckpointError(
            f"a file that {repo_id} lists is not there", hint="the model changed; try again"
        )
    if status is not None:
        return HubUnreachableError(
            f"{hub} answered {repo_id} with status {status}",
            hint="try again later, or download the model and give its directory",
        )
    return _unreachable(error, repo_id, hub)


def _unreachable(error: Exception, repo_id: str, hub: str) -> TightfitError:
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        reason = f"no answer in {_TIMEOUT_SECONDS:g} s"
    else:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return HubUnreachableError(
        f"cannot reach {hub} for {repo_id}: {reason}",
        hint="check the network, HF_ENDPOINT and proxies, or give a local directory",
    )
