"""Tensors that were made, kept until they have been read."""

from collections.abc import Mapping
from ctypes import CDLL
from threading import Lock, get_ident

from tightfit.units import MiB

_KEPT_BYTES = 256 * MiB
"""Of tensors that nobody is reading: scales that lie far away from their matrix."""
_TIDIED_BYTES = 64 * MiB

_Key = tuple[int, str]
"""Number of the unit, and kind of the tensor."""


class MadeCache:
    """The bytes of made tensors, for threads that read them piece by piece.

    Whoever makes a unit holds its lock of `locks`. Of a pickled one there is nothing in the copy.
    """

    def __init__(self, units: int) -> None:
        self.locks = [Lock() for _ in range(units)]
        self.held: dict[_Key, memoryview] = {}
        self.waiting: dict[_Key, None] = {}
        """Those that nobody is reading, the oldest first."""
        self.waiting_bytes = 0
        self._lock = Lock()
        self._left: dict[_Key, int] = {}
        self._done: set[_Key] = set()
        self._reading: dict[int, _Key] = {}
        self._reader: dict[_Key, int] = {}
        self._made_bytes = 0

    def __reduce__(self) -> tuple[type["MadeCache"], tuple[int]]:
        """What has been made is made again elsewhere."""
        return MadeCache, (len(self.locks),)

    def turn_to(self, key: _Key) -> None:
        """Readers of some ranks leave the rest of a tensor, and turn to the next."""
        thread = get_ident()
        with self._lock:
            before = self._reading.get(thread)
            self._reading[thread], self._reader[key] = key, thread
            if before is None or before == key or self._reader.get(before) != thread:
                return
            del self._reader[before]
            if before in self.held and before not in self.waiting:
                self._wait(before)

    def get(self, key: _Key) -> memoryview | None:
        """The bytes of a tensor, if they are there."""
        with self._lock:
            return self.held.get(key)

    def keep(self, unit: int, made: Mapping[str, memoryview], asked: str) -> None:
        """Keep a unit by kind: what was `asked` for, and of the rest what was not read before."""
        self._tidy(sum(map(len, made.values())))
        with self._lock:
            for kind, data in made.items():
                key = unit, kind
                if key in self.held or (kind != asked and key in self._done):
                    continue
                self.held[key], self._left[key] = data, len(data)
                if kind != asked:
                    self._wait(key)

    def has_read(self, key: _Key, nbytes: int) -> None:
        """Forget what has been read."""
        with self._lock:
            if key in self.held:
                self._begin(key)
                self._left[key] -= nbytes
                if self._left[key] <= 0:
                    self._done.add(key)
                    del self.held[key], self._left[key]

    def _tidy(self, nbytes: int) -> None:
        """Give back what the allocator keeps for each thread, in pieces that fit nothing else."""
        with self._lock:
            self._made_bytes += nbytes
            if self._made_bytes < _TIDIED_BYTES:
                return
            self._made_bytes = 0
        trim = getattr(CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def _wait(self, key: _Key) -> None:
        """For somebody to read it, unless there is too much of that."""
        self.waiting[key] = None
        self.waiting_bytes += len(self.held[key])
        while self.waiting_bytes > _KEPT_BYTES:
            oldest = next(iter(self.waiting))
            self._begin(oldest)
            del self.held[oldest], self._left[oldest]

    def _begin(self, key: _Key) -> None:
        """Wait no longer for somebody to read it."""
        if key in self.waiting:
            del self.waiting[key]
            self.waiting_bytes -= len(self.held[key])
