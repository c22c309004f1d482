"""A checkpoint whose tensors are computed when they are read: a source like any other.

It has one file. Tensors that are only copied are read from where they are; others are made a unit
at a time, all tensors of a matrix together, and kept until they have been read. What has been
forgotten is made again, to the same bytes.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Generic, TypeVar

import xxhash
from torch import Tensor, uint8

from tightfit.checkpoint.header import TensorInfo, encode_header, read_header
from tightfit.checkpoint.source import Source
from tightfit.errors import CheckpointError, UsageError
from tightfit.quantize.made_cache import MadeCache
from tightfit.quantize.matrices import Output
from tightfit.units import dtype_bytes

FILE = "model.safetensors"

U = TypeVar("U")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A tensor that is copied, perhaps under another name."""

    name: str
    source: Source
    info: TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Made(Generic[U]):
    """Tensors that are made together."""

    unit: U
    outputs: Mapping[str, Output]
    """By kind."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file: copied, or number `made` of those that are computed."""

    kept: Kept | None
    made: int
    kind: str
    nbytes: int


class ComputedSource(ABC, Generic[U]):
    """A source with one file, `FILE`, beside the side files of another source."""

    def __init__(self, base: Source, kept: Iterable[Kept], made: Sequence[Made[U]]) -> None:
        self.base = base
        self.label = base.label
        self._made = tuple(made)
        entries = [
            (one.name, one.info.dtype, one.info.shape, _Entry(one, -1, "", one.info.nbytes))
            for one in kept
        ]
        for number, unit in enumerate(self._made):
            for kind, one in unit.outputs.items():
                nbytes = dtype_bytes(one.dtype, prod(one.shape))
                entry = _Entry(None, number, kind, nbytes)
                entries.append((one.name, one.dtype, one.shape, entry))
        self._entries = [entry for *_, entry in entries]
        self._header = encode_header([(n, d, s, e.nbytes) for n, d, s, e in entries])
        self._starts: list[int] = []
        self._size = len(self._header)
        for entry in self._entries:
            self._starts.append(self._size)
            self._size += entry.nbytes
        self._elsewhere: list[tuple[Source, str, int]] = []
        self._cache = MadeCache(len(self._made))

    @abstractmethod
    def make(self, unit: U) -> Mapping[str, Tensor]:
        """The tensors of a unit, by kind."""

    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of the file."""
        return read_header(FILE, self._size, lambda start, stop: self._header[start:stop])

    def bundles(self) -> dict[str, str]:
        """Which unit each computed tensor belongs to: to be read together."""
        return {
            one.name: str(number)
            for number, unit in enumerate(self._made)
            for one in unit.outputs.values()
        }

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        return path == FILE or self.base.exists(path)

    def size(self, path: str) -> int:
        """Bytes of the file.

        Raises:
            CheckpointError: this comes from another machine, and is made of other files here.
        """
        if path != FILE:
            return self.base.size(path)
        for source, file, nbytes in self._elsewhere:
            if (here := source.size(file)) != nbytes:
                raise CheckpointError(
                    f"{source.label}: {file!r} has {here:,} bytes, and {nbytes:,} where tightfit "
                    "was started",
                    hint="all machines of the cluster need the same model at the same path",
                )
        return self._size

    def files(self) -> list[str]:
        """Names of the files: those of weights are the base's no more, but filtered by others."""
        return sorted({*self.base.files(), FILE})

    def others(self) -> list[str]:
        """What else the base has: directories, and links that lead nowhere."""
        return self.base.others()

    def local_path(self, path: str) -> Path | None:
        """None for what is computed."""
        return None if path == FILE else self.base.local_path(path)

    def state(self, path: str) -> list[int | str]:
        """What changes when the base's weights are written anew."""
        if path != FILE:
            return self.base.state(path)
        digest = xxhash.xxh3_128()
        for source, file in sorted(self._origins(), key=lambda one: (one[0].label, one[1])):
            digest.update(f"{file}\0{source.state(file)}\n".encode())
        return [self._size, digest.hexdigest()]

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` to `stop`, or to the end; fewer if the file is shorter."""
        if path != FILE:
            return self.base.read(path, start, stop)
        stop = self._size if stop is None else min(stop, self._size)
        found = [self._header[start:stop]] if start < len(self._header) else []
        number = max(bisect_right(self._starts, start) - 1, 0)
        while number < len(self._entries) and self._starts[number] < stop:
            entry, at = self._entries[number], self._starts[number]
            first, last = max(start - at, 0), min(stop - at, entry.nbytes)
            if first < last:
                found.append(self._read_entry(entry, first, last))
            number += 1
        return found[0] if len(found) == 1 else b"".join(found)

    def _read_entry(self, entry: _Entry, first: int, last: int) -> bytes:
        if (kept := entry.kept) is not None:
            at = kept.info.offset
            return kept.source.read(kept.info.file, at + first, at + last)
        key = entry.made, entry.kind
        self._cache.turn_to(key)
        with self._cache.locks[entry.made]:
            data = self._cache.get(key)
            if data is None:
                made = self._bytes_of(self._made[entry.made])
                self._cache.keep(entry.made, made, entry.kind)
                data = made[entry.kind]
            found = bytes(data[first:last])
            self._cache.has_read(key, last - first)
        return found

    def _bytes_of(self, unit: Made[U]) -> dict[str, memoryview]:
        tensors = self.make(unit.unit)
        found = {}
        for kind, output in unit.outputs.items():
            if kind not in tensors:
                raise UsageError(
                    f"{output.name} depends on what the model sees, and was not given",
                    hint="calibrate first, and prepare the job with `given`",
                )
            tensor = tensors[kind]
            assert tensor.numel() == prod(output.shape), (output, tensor.shape)
            found[kind] = tensor.contiguous().view(-1).view(uint8).numpy().data
        return found

    def _origins(self) -> set[tuple[Source, str]]:
        files = {(one.kept.source, one.kept.info.file) for one in self._entries if one.kept}
        return files | {
            (self.base, info.file) for unit in self._made for info in self.inputs(unit.unit)
        }

    @abstractmethod
    def inputs(self, unit: U) -> Iterable[TensorInfo]:
        """The tensors of the base that a unit is made of."""

    def __getstate__(self) -> dict[str, Any]:
        """With the sizes of files, which have to be the same elsewhere."""
        return {
            **vars(self),
            "_elsewhere": [(s, file, s.size(file)) for s, file in self._origins()],
        }


def read_exactly(source: Source, file: str, start: int, stop: int) -> bytes:
    """The bytes of a range.

    Raises:
        CheckpointError: the file ends before.
    """
    data = source.read(file, start, stop)
    if len(data) != stop - start:
        raise CheckpointError(
            f"{file} is truncated: byte {start + len(data)}, which belongs to a tensor, is missing",
            hint="the file is incomplete or was truncated meanwhile; download it again",
        )
    return data
