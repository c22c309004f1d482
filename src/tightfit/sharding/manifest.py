"""`tightfit-manifest.json`: what is in a sharded checkpoint, where each byte came from, checksums.

Engines ignore it. It is written last, so that a directory with a manifest is a complete one.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tightfit import __version__
from tightfit.checkpoint.files import MANIFEST
from tightfit.checkpoint.source import LocalSource, Source
from tightfit.errors import CheckpointError, VerificationError
from tightfit.model.layout import Parallel, Piece
from tightfit.model.pieces import element
from tightfit.sharding.boxes import fits
from tightfit.sharding.origin import States, states_of
from tightfit.sharding.parts import Checksums, Part
from tightfit.sharding.ranks import not_whole

FORMAT = 1
ORIGINALS = "tightfit-originals.safetensors"
"""What the ranks do not hold as it was: tensors that engines do not load, or compute with."""
_LARGEST_BYTES = 2**30
_MOST_RANKS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a rank's file: its place, its checksum, and the source boxes that fill it.

    `xxh3` is the 128-bit XXH3 of its bytes. Bytes that no piece covers hold `fill`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    xxh3: str
    fill: float
    pieces: tuple[Piece, ...]

    def to_json(self) -> dict[str, Any]:
        """Compact: a piece is [source, source shape, start, shape, at], and what else is done."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "offset": self.offset,
            "nbytes": self.nbytes,
            "xxh3": self.xxh3,
            "fill": self.fill,
            "pieces": [
                [p.source, p.source_shape, p.start, p.shape, p.at, *_changes(p)]
                for p in self.pieces
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One part of one rank."""

    name: str
    rank: int
    nbytes: int
    tensors: tuple[StoredTensor, ...]

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "name": self.name,
            "rank": self.rank,
            "nbytes": self.nbytes,
            "tensors": {tensor.name: tensor.to_json() for tensor in self.tensors},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole of a sharded checkpoint."""

    tightfit: str
    layout: str
    architecture: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel: bool = False
    source_name: str
    source_fingerprint: str
    source_states: States = field(default_factory=dict)
    """Of the files that were read of the plain checkpoint; older versions have none."""
    files: tuple[StoredFile, ...]
    left_out: Mapping[str, str | None] = field(default_factory=dict)
    """Tensors of the source that no file holds, and of which other tensor they are a copy."""
    quantized: Mapping[str, Any] = field(default_factory=dict)
    """The method and the recipe by which the source was quantized on the way, if it was."""

    def rank_files(self, rank: int) -> tuple[StoredFile, ...]:
        """The parts of one rank, which an engine loads."""
        return tuple(f for f in self.files if f.rank == rank and f.name != ORIGINALS)

    def parallel(self, *, uneven: bool) -> Parallel:
        """What the files were cut for; whether shares may be `uneven` is for the layout to say."""
        return Parallel(
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            expert_parallel=self.expert_parallel,
            uneven=uneven,
        )

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks without files; a whole checkpoint has none."""
        there = {file.rank for file in self.files}
        size = self.tensor_parallel_size * self.pipeline_parallel_size
        return tuple(rank for rank in range(size) if rank not in there)

    def with_files(self, files: tuple[StoredFile, ...]) -> "Manifest":
        """The same of other files."""
        return replace(self, files=files)

    def with_states(self, others: Iterable[States]) -> "Manifest":
        """The same, also of what other ranks were made of."""
        found: dict[str, list[int | str]] = {}
        for states in (*others, self.source_states):
            found |= states
        return replace(self, source_states=dict(sorted(found.items())))

    def only(self, rank: int) -> "Manifest":
        """The same of one rank."""
        return self.with_files(tuple(file for file in self.files if file.rank == rank))

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "format": FORMAT,
            "tightfit": self.tightfit,
            "layout": self.layout,
            "architecture": self.architecture,
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "expert_parallel": self.expert_parallel,
            "source": {
                "name": self.source_name,
                "fingerprint": self.source_fingerprint,
                **({"states": dict(self.source_states)} if self.source_states else {}),
                "left_out": dict(self.left_out),
                **({"quantized": dict(self.quantized)} if self.quantized else {}),
            },
            "files": [file.to_json() for file in self.files],
        }


def make_manifest(
    *,
    layout: str,
    architecture: str,
    parallel: Parallel,
    source_name: str,
    source_fingerprint: str,
    source_states: States,
    left_out: Mapping[str, str | None],
    quantized: Mapping[str, Any],
    parts: Sequence[Part],
    checksums: Checksums,
) -> Manifest:
    """Describe finished parts; `checksums` are by file and tensor name."""
    return Manifest(
        tightfit=__version__,
        layout=layout,
        architecture=architecture,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        expert_parallel=parallel.expert_parallel,
        source_name=source_name,
        source_fingerprint=source_fingerprint,
        source_states=source_states,
        files=tuple(stored_file(part, checksums) for part in parts),
        left_out=left_out,
        quantized=quantized,
    )


def stored_file(part: Part, checksums: Checksums) -> StoredFile:
    """A finished part."""
    return StoredFile(
        name=part.name,
        rank=part.rank.rank,
        nbytes=part.nbytes,
        tensors=tuple(
            StoredTensor(
                name=one.tensor.name,
                dtype=one.tensor.dtype,
                shape=one.tensor.shape,
                offset=one.offset,
                nbytes=one.tensor.nbytes,
                xxh3=checksums[part.name, one.tensor.name],
                fill=one.tensor.fill,
                pieces=one.tensor.pieces,
            )
            for one in part.placed
        ),
    )


def read_manifest(directory: Path | Source) -> Manifest:
    """Read the manifest of a sharded checkpoint, which may be distant.

    Raises:
        VerificationError: there is none, or it is not one of ours.
    """
    if isinstance(directory, Path) and not os.path.isdir(directory):
        raise _no_manifest(str(directory))
    source = LocalSource(directory) if isinstance(directory, Path) else directory
    path = f"{source.label}/{MANIFEST}"
    if not source.exists(MANIFEST):
        raise not_whole(source) or _no_manifest(source.label)
    if source.size(MANIFEST) > _LARGEST_BYTES:
        raise _not_ours(path, "it is larger than any manifest")
    try:
        document = json.loads(source.read(MANIFEST))
    except CheckpointError as error:
        raise VerificationError(error.message, hint=error.hint) from error
    except (ValueError, RecursionError) as error:
        raise _not_ours(path, f"it is not JSON ({error})") from None
    manifest = manifest_of(document, path)
    if manifest.missing_ranks:
        count = len({file.rank for file in manifest.files})
        raise _not_ours(
            path, f"ValueError: files of {count} ranks, not of all and only those of the layout"
        )
    return manifest


def manifest_of(document: Any, path: Path | str) -> Manifest:
    """The manifest in a document, which may be of some ranks only.

    Raises:
        VerificationError: it is not one of ours; `path` says where it came from.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _not_ours(path, f"its format is not {FORMAT}")
    try:
        return _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _not_ours(path, f"{type(error).__name__}: {error}") from None


def stored_files(entries: Iterable[Mapping[str, Any]]) -> tuple[StoredFile, ...]:
    """The files of a document.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: they are not as ours.
    """
    return tuple(
        StoredFile(
            name=_text(file["name"]),
            rank=_size(file["rank"]),
            nbytes=_size(file["nbytes"]),
            tensors=tuple(_tensors(file["tensors"])),
        )
        for file in entries
    )


def _parse(document: Mapping[str, Any]) -> Manifest:
    files = stored_files(document["files"])
    tensor_parallel_size = _size(document["tensor_parallel_size"]) or _wrong(0)
    pipeline_parallel_size = _size(document["pipeline_parallel_size"]) or _wrong(0)
    ranks = {file.rank for file in files}
    world_size = tensor_parallel_size * pipeline_parallel_size
    # Nothing may loop over ranks that only the manifest speaks of.
    if not ranks or world_size > _MOST_RANKS or max(ranks) >= world_size:
        raise ValueError(f"files of {len(ranks)} ranks, not of all and only those of the layout")
    return Manifest(
        tightfit=_text(document["tightfit"]),
        layout=_text(document["layout"]),
        architecture=_text(document["architecture"]),
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        expert_parallel=_flag(document.get("expert_parallel", False)),
        # Of a directory, whose name need not be UTF-8.
        source_name=str(document["source"]["name"]),
        source_fingerprint=_text(document["source"]["fingerprint"]),
        source_states=states_of(document["source"].get("states", {})),
        files=files,
        left_out={
            _text(name): None if twin is None else _text(twin)
            for name, twin in document["source"].get("left_out", {}).items()
        },
        quantized=dict(document["source"].get("quantized", {}).items()),
    )


def _tensors(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[StoredTensor]:
    for name, entry in entries.items():
        tensor = StoredTensor(
            name=_text(name),
            dtype=_text(entry["dtype"]),
            shape=_sizes(entry["shape"]),
            offset=_size(entry["offset"]),
            nbytes=_size(entry["nbytes"]),
            xxh3=_text(entry["xxh3"]),
            fill=_number(entry["fill"]),
            pieces=tuple(
                Piece(
                    source=_text(source),
                    source_shape=_sizes(source_shape),
                    start=_sizes(start),
                    shape=_sizes(shape),
                    at=_sizes(at),
                    **_change(change),
                )
                for source, source_shape, start, shape, at, *change in entry["pieces"]
            ),
        )
        _check_tensor(tensor)
        yield tensor


def _check_tensor(tensor: StoredTensor) -> None:
    """Refuse what cannot be carried out: nothing that is planned of a manifest looks again."""
    if tensor.fill:
        element(tensor.fill, tensor.dtype)
    for piece in tensor.pieces:
        if not fits(piece, tensor.shape):
            raise ValueError(f"a piece of {tensor.name!r} lies outside of it")
        if piece.decay and tensor.dtype != "F32":
            raise ValueError(f"{tensor.name!r} has decay rates in {tensor.dtype:.40}")


def _changes(piece: Piece) -> list[Any]:
    """What is done on the way, but for copying, and the source's shape as the piece sees it."""
    found: list[Any] = ["transposed"] * piece.transposed + ["decay"] * piece.decay
    return found if piece.view is None else [*found, piece.view]


def _change(values: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for value in values:
        if isinstance(value, list):
            found["view"] = _sizes(value)
        else:
            found[value if value in ("transposed", "decay") else _wrong(value)] = True
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str) or value == "__metadata__":
        _wrong(value)
    # JSON can spell half of a surrogate pair, which no file and no terminal can hold.
    value.encode()
    return str(value)


def _number(value: Any) -> float:
    good = type(value) in (int, float) and math.isfinite(value)
    return float(value) if good else _wrong(value)


def _flag(value: Any) -> bool:
    return value if type(value) is bool else _wrong(value)


def _size(value: Any) -> int:
    return value if type(value) is int and value >= 0 else _wrong(value)


def _sizes(values: Any) -> tuple[int, ...]:
    return tuple(_size(value) for value in values)


def _wrong(value: Any) -> Any:
    raise ValueError(f"unexpected {value!r:.40}")


def _no_manifest(where: str) -> VerificationError:
    return VerificationError(
        f"{where} has no {MANIFEST}: it is not a complete output of `tightfit shard`",
        hint="run `tightfit shard` again",
    )


def _not_ours(path: Path | str, why: str) -> VerificationError:
    return VerificationError(
        f"{path} is damaged or of another version of tightfit: {why}",
        hint="run `tightfit shard` again",
    )
