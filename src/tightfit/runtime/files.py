"""Safetensors files as tensors, without copying: a private memory map and views into it."""

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tightfit.checkpoint.header import TensorInfo, read_header
from tightfit.errors import CheckpointError

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


class TensorFile:
    """A safetensors file, mapped into memory.

    The mapping is private, so writing to a view never changes the file. Pages count as resident
    only once they are read: `settle` reads those of tensors that stay, `drop` gives back
    those of one that was copied.

    Raises:
        CheckpointError: the file cannot be opened, or is not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
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

    def drop(self, info: TensorInfo) -> None:
        """Give back the pages of a tensor that was copied; the next read fetches them again."""
        self._drop(info.offset, info.offset + info.nbytes)

    def settle(self, kept: Iterable[TensorInfo]) -> None:
        """Make exactly the kept tensors resident: read their pages now, and give back all others.

        The kernel maps pages around those that were asked for, so the rest is dropped at the end.
        """
        dropped = 0
        ranges = sorted((info.offset, info.offset + info.nbytes) for info in kept if info.nbytes)
        for start, stop in ranges:
            self._read_pages(start, stop)
        for start, stop in [*ranges, (len(self._map), len(self._map))]:
            self._drop(dropped, start)
            dropped = stop

    def _read_pages(self, start: int, stop: int) -> None:
        start -= start % mmap.PAGESIZE
        try:
            self._map.madvise(_MADV_POPULATE_READ, start, stop - start)
        except (OSError, ValueError):
            for page in range(start, stop, mmap.PAGESIZE):
                self._map[page]

    def _drop(self, start: int, stop: int) -> None:
        """Drop whole pages within the range. Nothing writes to views, so nothing is lost."""
        start += -start % mmap.PAGESIZE
        if stop < len(self._map):
            stop -= stop % mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
