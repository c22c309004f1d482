"""What a rank reads from its files, carried out in their order while the disk stays busy.

A read is a range of a file that is either used where it lies, or copied into a tensor. Both go
through the memory map: its pages are those of the kernel's cache, so nothing is copied that need
not be. The kernel is asked for the next ranges while one is used. Ranges are short, and given back
once they are copied: beyond the weights, loading needs a few megabytes, whatever the model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.checkpoint.header import TensorInfo
from tightfit.runtime.loading.files import WeightFile
from tightfit.units import MiB

CHUNK_BYTES = 8 * MiB
_AHEAD_BYTES = 64 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Bytes of a file from `start` up to `stop`, and where they go; nowhere if they stay."""

    file: WeightFile
    start: int
    stop: int
    source: Tensor | None = None
    target: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """How many bytes of the file are read."""
        return self.stop - self.start


def keep(file: WeightFile, info: TensorInfo) -> Iterator[Read]:
    """Use a tensor where it lies."""
    end = info.offset + info.nbytes
    for start in range(info.offset, end, CHUNK_BYTES):
        yield Read(file=file, start=start, stop=min(start + CHUNK_BYTES, end))


def copy(file: WeightFile, info: TensorInfo, source: Tensor, target: Tensor) -> Iterator[Read]:
    """Copy a box of a tensor.

    Args:
        file: where it is.
        info: the whole tensor.
        source: the box, a view into `file.view(info)`.
        target: of the same shape, on any device, of any floating dtype.
    """
    base = file.view(info).data_ptr()
    for part, goal in _chunks(source, target):
        start = info.offset + part.data_ptr() - base
        yield Read(file=file, start=start, stop=start + _span(part), source=part, target=goal)


def carry_out(reads: Iterable[Read], device: torch.device) -> None:
    """Do all of it; afterwards only what is used where it lies is resident."""
    queue = sorted(reads, key=lambda read: (read.file.name, read.start))
    if device.type == "cuda":
        from tightfit.runtime.loading.uploads import upload

        upload(queue, device, CHUNK_BYTES)
        return
    asked = ahead = 0
    for read in queue:
        while asked < len(queue) and ahead < _AHEAD_BYTES:
            queue[asked].file.prefetch(queue[asked].start, queue[asked].stop)
            ahead += queue[asked].nbytes
            asked += 1
        ahead -= read.nbytes
        if read.source is None or read.target is None:
            read.file.populate(read.start, read.stop)
            continue
        read.file.fetch(read.start, read.stop)
        read.target.copy_(read.source)
        read.file.drop(read.start, read.stop)
    kept: dict[WeightFile, list[tuple[int, int]]] = {}
    for read in queue:
        ranges = kept.setdefault(read.file, [])
        if read.target is None:
            ranges.append((read.start, read.stop))
    for file, ranges in kept.items():
        file.drop_all_but(ranges)


def _chunks(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows of both, which span at most `CHUNK_BYTES` of the source."""
    if source.numel() == 0:
        return
    if _span(source) <= CHUNK_BYTES:
        yield source, target
    elif len(source) == 1:
        yield from _chunks(source[0], target[0])
    else:
        rows = max(1, CHUNK_BYTES // (source.stride(0) * source.element_size()))
        for first in range(0, len(source), rows):
            count = min(rows, len(source) - first)
            yield from _chunks(source.narrow(0, first, count), target.narrow(0, first, count))


def _span(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
