"""One model's checkpoint, wherever it is: its config, its weight files, and every tensor in them.

`open_checkpoint` reads little: the config and the index. The headers are read when somebody asks
for the tensors, and weights never.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tightfit.checkpoint.files import CONFIG, INDEX, Weights, find_weights, read_config
from tightfit.checkpoint.header import TensorInfo, read_header
from tightfit.checkpoint.source import LocalSource, Source
from tightfit.errors import CheckpointError, ConfigError, UsageError

# One request of this many bytes fetches most headers whole: huggingface_hub found that 97% of them
# are shorter (`parse_safetensors_file_metadata`).
_FIRST_READ_BYTES = 100_000

_HUB_PAGE = re.compile(
    r"(?:https?://(?:huggingface\.co|hf\.co)/|hf://)([\w.-]+/[\w.-]+)(?:(?:/tree/|@)([^/]+))?/?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's config, and where its tensors are.

    `files` are the weight files, relative to `source`; `missing_files` are those of them that are
    not there. A sharded checkpoint (of `tightfit shard` or vLLM's sharded state) has no `files`.
    `unusable_weights` names weights in other formats where there are none in safetensors.
    """

    name: str
    source: Source
    config: dict[str, Any]
    files: tuple[str, ...]
    has_weights: bool
    missing_files: tuple[str, ...] = ()
    is_sharded: bool = False
    unusable_weights: tuple[str, ...] = ()
    index: dict[str, str] | None = field(default=None, repr=False)
    known: InitVar[Mapping[str, TensorInfo]] = MappingProxyType({})
    """All tensors, where no header has to be read for them."""
    _tensors: dict[str, TensorInfo] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self, known: Mapping[str, TensorInfo]) -> None:
        self._tensors.update(known)

    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, from the headers of all files, read once.

        With an index only the tensors that it names count, as for transformers.

        Raises:
            CheckpointError: a file is missing or damaged, a tensor is in two files, or the index
                promises what a file does not hold.
        """
        if not self._tensors and self.files:
            self._tensors.update(self._read_tensors())
        return self._tensors

    def _read_tensors(self) -> dict[str, TensorInfo]:
        if self.missing_files:
            more = len(self.missing_files) - 1
            raise CheckpointError(
                f"{self.source.label} lacks the weight file {self.missing_files[0]!r}"
                + (f" and {more} more" if more else "")
                + (f", which {INDEX} names" if self.index else ""),
                hint="the download is incomplete; download the missing files",
            )
        result: dict[str, TensorInfo] = {}
        for header in _map(self._read_header, self.files, self.source):
            for name, info in header.items():
                if self.index is not None and self.index.get(name) != info.file:
                    continue
                if name in result:
                    raise CheckpointError(
                        f"{self.source.label}: tensor {name!r} is both in {result[name].file!r} "
                        f"and in {info.file!r}, and there is no {INDEX} to choose",
                        hint="the directory holds files of two models or two downloads; "
                        "remove those that do not belong",
                    )
                result[name] = info
        for name, file in (self.index or {}).items():
            if name not in result:
                raise CheckpointError(
                    f"{self.source.label}: {INDEX} says that tensor {name!r} is in {file!r}, "
                    "which does not hold it",
                    hint="the index and the weights are of different versions; "
                    "download the checkpoint again",
                )
        return result

    def _read_header(self, file: str) -> dict[str, TensorInfo]:
        size = self.source.size(file)
        first = b""
        if self.source.local_path(file) is None:
            first = self.source.read(file, 0, min(size, _FIRST_READ_BYTES))

        def read(start: int, stop: int) -> bytes:
            if stop <= len(first):
                return first[start:stop]
            return self.source.read(file, start, stop)

        return read_header(file, size, read)


def open_checkpoint(
    model: str, *, revision: str | None = None, download: bool = False
) -> Checkpoint:
    """Open a model by whatever a user may call it.

    Args:
        model: a directory, a `config.json`, a directory of the Hugging Face cache, an fsspec URL,
            or a Hub id. What exists locally wins over the Hub.
        revision: branch, tag or commit, for a Hub id or a cache directory.
        download: fetch the weights of a Hub id, so that the result is local.

    Raises:
        ConfigError: there is no such model, or its config cannot be read.
        CheckpointError: the index is damaged.
        UsageError: a revision for something that has none.
    """
    if not model:
        raise UsageError(
            "the model is an empty string", hint="give a directory, a config.json or a Hub id"
        )
    if page := _HUB_PAGE.fullmatch(model):
        return _open_hub(page[1], revision or page[2], download)
    path = Path(os.path.expanduser(model))
    if "://" not in model and not os.path.exists(path):
        if _looks_like_path(model):
            raise ConfigError(
                f"there is no file or directory {model}",
                hint="check the path; a Hub id has the form organization/name",
            )
        return _open_hub(model, revision, download)
    if _is_cache_repo(path):
        return _open_directory(_snapshot(path, revision))
    if revision is not None:
        raise UsageError(
            f"--revision {revision} does not apply to {model}",
            hint="only models on the Hub have revisions; leave the option out",
        )
    if "://" in model:
        return _open_url(model)
    if path.is_dir():
        return _open_directory(path)
    return _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    if path.name == CONFIG:
        return _open_directory(path.parent)
    if not path.is_file() or path.suffix != ".json":
        raise ConfigError(
            f"{path} is neither a directory nor a JSON file",
            hint="give the directory of the model, or its config.json",
        )
    source = LocalSource(path.parent)
    return _build(path.stem, source, read_config(source, path.name), Weights())


def _open_directory(path: Path) -> Checkpoint:
    source = LocalSource(path)
    real = path.resolve()
    repo = real.parent.parent
    is_snapshot = real.parent.name == "snapshots" and _is_cache_repo(repo)
    name = repo.name.removeprefix("models--").replace("--", "/", 1) if is_snapshot else real.name
    return _build(name, source, read_config(source), find_weights(source))


def _open_url(url: str) -> Checkpoint:
    url = url.removesuffix("/" + CONFIG).rstrip("/")
    if url.startswith(("file://", "local://")):
        return _open_directory(Path(url.split("://", 1)[1]))
    from tightfit.checkpoint.remote_source import FsspecSource

    source = FsspecSource(url)
    return _build(url, source, read_config(source), find_weights(source))


def _open_hub(repo_id: str, revision: str | None, download: bool) -> Checkpoint:
    from tightfit.checkpoint import hub

    source: Source
    if download:
        source = LocalSource(hub.download(repo_id, revision), repo_id)
        return _build(repo_id, source, read_config(source), find_weights(source))
    cached: Source | None = None
    if snapshot := hub.cached_snapshot(repo_id, revision):
        cached = LocalSource(snapshot, repo_id)
        weights = find_weights(cached)
        if weights.files and not weights.missing and cached.exists(CONFIG):
            return _build(repo_id, cached, read_config(cached), weights)
    try:
        source = hub.HubSource(repo_id, revision)
    except hub.HubUnreachableError:
        if cached is None or not cached.exists(CONFIG):
            raise
        # An earlier plan left the config but no weights: what is known still makes a plan.
        return _build(repo_id, cached, read_config(cached), Weights())
    return _build(repo_id, source, read_config(source), find_weights(source))


def _build(name: str, source: Source, config: dict[str, Any], weights: Weights) -> Checkpoint:
    return Checkpoint(
        name=name,
        source=source,
        config=config,
        files=weights.files,
        has_weights=bool(weights.files),
        missing_files=weights.missing,
        is_sharded=weights.is_sharded,
        unusable_weights=weights.unusable,
        index=weights.index,
    )


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.endswith(".json") or model.count("/") > 1


def _is_cache_repo(path: Path) -> bool:
    return path.name.startswith("models--") and os.path.isdir(path / "snapshots")


def _snapshot(repo: Path, revision: str | None) -> Path:
    from tightfit.checkpoint.hub import resolve_snapshot

    if found := resolve_snapshot(repo, revision):
        return found
    available = sorted(p.name for p in (repo / "snapshots").iterdir())
    if revision is None and len(available) == 1:
        return repo / "snapshots" / available[0]
    raise ConfigError(
        f"{repo} has no snapshot of revision {revision or 'main'!r}",
        hint=f"cached are: {', '.join(available) or 'none'} (--revision)",
    )


def _map(
    function: Callable[[str], dict[str, TensorInfo]], files: tuple[str, ...], source: Source
) -> list[dict[str, TensorInfo]]:
    """Apply `function` to all files; remote ones concurrently, for the round trips."""
    if len(files) == 1 or source.local_path(files[0]) is not None:
        return [function(file) for file in files]
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(max_workers=8)
    try:
        return list(pool.map(function, files))
    finally:
        pool.shutdown(cancel_futures=True)
