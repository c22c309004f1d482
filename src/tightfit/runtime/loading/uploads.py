"""From files to a GPU: several threads read into pinned memory, and send what they read.

Pages are copied once, by the kernel, straight to where the GPU fetches them. A range is sent as it
lies in the file; cutting and conversion happen on the GPU, which does them at the speed of its
memory.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tightfit.runtime.loading.reads import Read

_THREADS = 8


def upload(reads: "Sequence[Read]", device: torch.device, chunk_bytes: int) -> None:
    """Carry out reads whose targets are on a GPU.

    Args:
        reads: in the order of their files.
        device: the GPU.
        chunk_bytes: no read is longer.
    """
    threads = max(1, min(_THREADS, os.cpu_count() or 1, len(reads)))
    # The targets were allocated, and perhaps filled, on the current stream.
    torch.cuda.synchronize(device)
    turns = _Turns(reads)
    with ThreadPoolExecutor(threads) as pool:
        try:
            jobs = [pool.submit(_work, turns, device, chunk_bytes) for _ in range(threads)]
            for job in jobs:
                job.result()
        finally:
            # The threads are waited for, also after an interrupt.
            turns.stop()


class _Turns:
    """Gives every read to one thread."""

    def __init__(self, reads: "Sequence[Read]") -> None:
        self._reads = iter(reads)
        self._lock = Lock()

    def __iter__(self) -> "Iterator[Read]":
        while True:
            with self._lock:
                read = next(self._reads, None)
            if read is None:
                return
            yield read

    def stop(self) -> None:
        """Give no more."""
        with self._lock:
            self._reads = iter(())


class _Slot:
    """Memory on both sides for one read, and the stream that it is sent on."""

    def __init__(self, device: torch.device, chunk_bytes: int) -> None:
        self.host = torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(chunk_bytes, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)


@torch.inference_mode()
def _work(turns: _Turns, device: torch.device, chunk_bytes: int) -> None:
    # A thread begins on the first GPU, where leaving a stream's context would make one of CUDA's.
    torch.cuda.set_device(device)
    # While one is sent, the other is filled.
    slots = [_Slot(device, chunk_bytes) for _ in range(2)]
    torch.cuda.current_stream(device).synchronize()
    try:
        for slot, read in zip(cycle(slots), turns, strict=False):
            assert read.source is not None
            assert read.target is not None
            slot.stream.synchronize()
            host = slot.host[: read.nbytes]
            read.file.read_into(host.numpy().data, read.start)
            with torch.cuda.stream(slot.stream):
                staged = slot.device[: read.nbytes]
                staged.copy_(host, non_blocking=True)
                read.target.copy_(_as(staged, read.source))
    except BaseException:
        turns.stop()
        raise
    finally:
        for slot in slots:
            slot.stream.synchronize()


def _as(staged: Tensor, source: Tensor) -> Tensor:
    """The bytes of a box, seen as the box."""
    return staged.view(source.dtype).as_strided(source.shape, source.stride())
