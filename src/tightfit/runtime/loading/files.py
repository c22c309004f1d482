"""Safetensors files as tensors, without copying: a private memory map and views into it.

Of files that are not here, memory of the tensors' sizes takes the place of the map, and what is
needed is fetched into it.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tightfit.checkpoint.header import TensorInfo, read_header
from tightfit.checkpoint.source import Source
from tightfit.errors import CheckpointError
from tightfit.runtime.loading.pages import MADV_POPULATE_READ, PAGES
from tightfit.units import KiB

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "F8_E8M0": torch.uint8,
    "U32": torch.int32,
}
"""Safetensors' dtypes as torch's, as far as the runtime computes with them: some as their bits."""

_PREFETCH_BYTES = 512 * KiB
"""The kernel cuts a request to what a device takes at once, and forgets the rest."""


class WeightFile(Protocol):
    """A file whose tensors can be looked at; ranges are bytes of the file."""

    name: str

    def view(self, info: TensorInfo) -> Tensor:
        """The tensor's bytes as a tensor; they are there once they were fetched or populated."""
        ...

    def prefetch(self, start: int, stop: int) -> None:
        """Ask for bytes that will soon be needed, without waiting."""
        ...

    def fetch(self, start: int, stop: int) -> None:
        """Have bytes where a view can read them."""
        ...

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Copy bytes to a buffer, as many as it has; from several threads at once."""
        ...

    def populate(self, start: int, stop: int) -> None:
        """Have bytes in memory, to stay."""
        ...

    def drop(self, start: int, stop: int) -> None:
        """Give back the memory of bytes that are no longer needed."""
        ...

    def drop_all_but(self, kept: Iterable[tuple[int, int]]) -> None:
        """Give back the memory of all others."""
        ...


class TensorFile:
    """A safetensors file, mapped into memory.

    The mapping is private, so writing to a view never changes the file. Its pages are those of the
    kernel's cache, and count as resident from when they are first read until they are dropped.

    Raises:
        CheckpointError: the file cannot be opened, or is not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size

                def read(start: int, stop: int) -> bytes:
                    file.seek(start)
                    return file.read(stop - start)

                self.tensors = read_header(path.name, size, read)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._descriptor = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._descriptor)
            self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
            PAGES.leave(self._address, self._address + len(self._map))
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error.strerror or error}",
                hint="check that the checkpoint is complete, and its permissions",
            ) from error

    def view(self, info: TensorInfo) -> Tensor:
        """The tensor's bytes in the file as a tensor; no page is read yet.

        Raises:
            CheckpointError: a dtype that the runtime does not compute with.
        """
        return _view(self._map, info, info.offset)

    def prefetch(self, start: int, stop: int) -> None:
        """Let the kernel read bytes into its cache; this does not wait for them."""
        for at in range(start - start % mmap.PAGESIZE, stop, _PREFETCH_BYTES):
            self._map.madvise(mmap.MADV_WILLNEED, at, min(_PREFETCH_BYTES, stop - at))

    def fetch(self, start: int, stop: int) -> None:
        """Nothing: the kernel reads pages when they are used."""

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Copy bytes from the kernel's cache, without mapping its pages.

        Raises:
            CheckpointError: the file cannot be read, or ends before.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], start + done)
            except OSError as error:
                raise CheckpointError(
                    f"cannot read {self.name}: {error.strerror or error}",
                    hint="check the disk or the network that the file is on",
                ) from error
            if count == 0:
                raise _truncated(self.name, start + done)
            done += count

    def populate(self, start: int, stop: int) -> None:
        """Make the pages of these bytes resident."""
        start -= start % mmap.PAGESIZE
        try:
            self._map.madvise(MADV_POPULATE_READ, start, stop - start)
        except (OSError, ValueError):
            for page in range(start, stop, mmap.PAGESIZE):
                self._map[page]

    def drop(self, start: int, stop: int) -> None:
        """Give back the pages that lie within these bytes; the next read fetches them again.

        Nobody must have written to views of them.
        """
        start += -start % mmap.PAGESIZE
        if stop < len(self._map):
            stop -= stop % mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def drop_all_but(self, kept: Iterable[tuple[int, int]]) -> None:
        """Give back all pages outside these ranges; the kernel maps some around those it reads."""
        dropped = 0
        for start, stop in [*sorted(kept), (len(self._map), len(self._map))]:
            self.drop(dropped, start)
            dropped = max(dropped, stop)
            if stop > start:
                first, last = start - start % mmap.PAGESIZE, stop + -stop % mmap.PAGESIZE
                PAGES.keep(self._address + first, self._address + last)


class FetchedFile:
    """A file of a source that has no local files, or whose tensors are computed."""

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self._source = source
        self._maps: dict[int, tuple[mmap.mmap, Tensor]] = {}

    def view(self, info: TensorInfo) -> Tensor:
        """Memory for the tensor, which is not used before something is fetched.

        Raises:
            CheckpointError: a dtype that the runtime does not compute with.
        """
        if info.offset not in self._maps:
            memory = mmap.mmap(-1, max(info.nbytes, 1))
            self._maps[info.offset] = memory, _view(memory, info, 0)
        return self._maps[info.offset][1]

    def prefetch(self, start: int, stop: int) -> None:
        """Nothing: sources have no such request."""

    def fetch(self, start: int, stop: int) -> None:
        """Read bytes of one tensor.

        Raises:
            CheckpointError: the file ends before.
        """
        memory, first = self._map(start)
        self.read_into(memoryview(memory)[start - first : stop - first], start)

    populate = fetch

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Read bytes from the source.

        Raises:
            CheckpointError: the file ends before.
        """
        data = self._source.read(self.name, start, start + len(buffer))
        if len(data) != len(buffer):
            raise _truncated(self.name, start + len(data))
        buffer[:] = data

    def drop(self, start: int, stop: int) -> None:
        """Give back the pages that lie within these bytes of one tensor."""
        memory, first = self._map(start)
        start, stop = start - first, stop - first
        start += -start % mmap.PAGESIZE
        if stop < len(memory):
            stop -= stop % mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            memory.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def drop_all_but(self, kept: Iterable[tuple[int, int]]) -> None:
        """Nothing: what was not fetched takes no memory."""

    def _map(self, at: int) -> tuple[mmap.mmap, int]:
        """The tensor that a byte belongs to, and its first byte."""
        first = max(offset for offset in self._maps if offset <= at)
        return self._maps[first][0], first


def _truncated(name: str, byte: int) -> CheckpointError:
    return CheckpointError(
        f"{name} is truncated: byte {byte} is missing",
        hint="the file is incomplete or was truncated meanwhile; download it again",
    )


def _view(memory: mmap.mmap, info: TensorInfo, offset: int) -> Tensor:
    dtype = TORCH_DTYPES.get(info.dtype)
    if dtype is None:
        raise CheckpointError(
            f"tensor {info.name!r} in {info.file} has dtype {info.dtype}, which the built-in "
            "runtime does not load",
            hint="serve this checkpoint with vLLM",
        )
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=dtype)
    count = info.nbytes // dtype.itemsize
    flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
    return flat.view(info.shape)
