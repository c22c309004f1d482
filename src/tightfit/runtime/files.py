"""Safetensors files as tensors, without copying: a private memory map and views into it."""

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tightfit.checkpoint.header import TensorInfo, read_header
from tightfit.errors import CheckpointError
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
}
"""Safetensors' dtypes as torch's, as far as the runtime computes with them."""

_MADV_POPULATE_READ = 22  # Linux 5.14; Python's mmap has no name for it
_PREFETCH_BYTES = 512 * KiB
"""The kernel cuts a request to what a device takes at once, and forgets the rest."""


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
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=info.offset)
        return flat.view(info.shape)

    def prefetch(self, start: int, stop: int) -> None:
        """Let the kernel read bytes into its cache; this does not wait for them."""
        for at in range(start - start % mmap.PAGESIZE, stop, _PREFETCH_BYTES):
            self._map.madvise(mmap.MADV_WILLNEED, at, min(_PREFETCH_BYTES, stop - at))

    def populate(self, start: int, stop: int) -> None:
        """Make the pages of these bytes resident."""
        start -= start % mmap.PAGESIZE
        try:
            self._map.madvise(_MADV_POPULATE_READ, start, stop - start)
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
