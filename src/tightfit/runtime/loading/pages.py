"""The pages of files that weights are used from, wherever the kernel has them at the moment.

A kernel may drop pages of files that were not used for some seconds, long before memory is scarce
(Linux' DAMON does), and reads them again when they are used. They belong to the run all the same:
before memory is measured they are brought back.
"""

import ctypes
import mmap
from bisect import bisect_left, insort
from functools import cache

from torch import Tensor

MADV_POPULATE_READ = 22  # Linux 5.14; Python's mmap has no name for it


class FilePages:
    """Ranges of addresses of this process, which do not overlap."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        """The first byte of each, and the one after its last, in order."""

    def keep(self, start: int, stop: int) -> None:
        """These are used from now on."""
        self.leave(start, stop)
        insort(self.ranges, (start, stop))

    def leave(self, start: int, stop: int) -> None:
        """These are used no more."""
        ranges = self.ranges
        first = bisect_left(ranges, (start, start))
        if first and ranges[first - 1][1] > start:
            first -= 1
        last = bisect_left(ranges, (stop, stop))
        ranges[first:last] = [
            part
            for low, high in ranges[first:last]
            for part in ((low, min(high, start)), (max(low, stop), high))
            if part[0] < part[1]
        ]

    def restore(self) -> None:
        """Have all of them in memory; those of files that were closed are forgotten."""
        self.ranges = [one for one in self.ranges if advise(*one, MADV_POPULATE_READ)]


PAGES = FilePages()
"""Of this process."""


def forget(tensor: Tensor) -> None:
    """Give back the memory of a tensor that nobody will look at again, though its map stays."""
    start = tensor.data_ptr() + -tensor.data_ptr() % mmap.PAGESIZE
    stop = tensor.data_ptr() + tensor.nbytes
    stop -= stop % mmap.PAGESIZE
    if stop > start and hasattr(mmap, "MADV_DONTNEED"):
        advise(start, stop, mmap.MADV_DONTNEED)
        PAGES.leave(start, stop)


def advise(start: int, stop: int, advice: int) -> bool:
    """Tell the kernel about whole pages; False if it does not take that."""
    libc = _libc()
    if not hasattr(libc, "madvise"):
        return False
    return libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice) == 0


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
