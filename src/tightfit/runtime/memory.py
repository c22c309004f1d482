"""Measuring what a run really uses, phase by phase, to set beside what the plan said.

A `MemoryLedger` records for each phase the memory before, after, and at the peak between. On a CPU
that is the resident set of the process, from Linux's `/proc/self/status`: anonymous pages and file
pages (weights that are used where they lie in a file). Writing 5 to `/proc/self/clear_refs` resets
the kernel's record of the peak.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tightfit.errors import UnsupportedModelError
from tightfit.units import KiB, MiB

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Memory of one phase; `peak_bytes` is absolute, like the other two."""

    before_bytes: int
    after_bytes: int
    peak_bytes: int

    @property
    def kept_bytes(self) -> int:
        """What the phase allocated and did not free."""
        return self.after_bytes - self.before_bytes

    @property
    def transient_bytes(self) -> int:
        """What the phase needed at its peak beyond what there was before."""
        return self.peak_bytes - self.before_bytes


class MemoryLedger(Protocol):
    """Phases of a run by name, in order."""

    readings: dict[str, Reading]

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measure what happens inside; a name may be used once."""
        ...

    def resident_bytes(self) -> int:
        """What is in use now."""
        ...


class CpuLedger:
    """`MemoryLedger` of this process's resident memory.

    It also tells glibc to return large blocks to the kernel when they are freed; otherwise its
    thresholds grow with use, and the resident size says what was once needed.

    Raises:
        UnsupportedModelError: this is not Linux.
    """

    def __init__(self) -> None:
        if not _STATUS.exists():
            raise UnsupportedModelError(
                f"memory cannot be measured on {sys.platform}",
                hint="run on Linux; `tightfit plan` works everywhere",
            )
        self.readings: dict[str, Reading] = {}
        self._libc = ctypes.CDLL(None)
        if hasattr(self._libc, "mallopt"):
            self._libc.mallopt(_M_MMAP_THRESHOLD, MiB)
            self._libc.mallopt(_M_TRIM_THRESHOLD, MiB)
            self._libc.mallopt(_M_ARENA_MAX, 2)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        assert name not in self.readings, f"phase {name} twice"
        self._settle()
        _reset_peak()
        before = self.resident_bytes()
        yield
        peak = max(status_bytes("VmHWM"), self.resident_bytes())
        self._settle()
        self.readings[name] = Reading(
            before_bytes=before, after_bytes=self.resident_bytes(), peak_bytes=peak
        )

    def resident_bytes(self) -> int:
        """Anonymous and file pages; shared memory is counted too."""
        return status_bytes("VmRSS")

    def _settle(self) -> None:
        if hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)


def status_bytes(field: str) -> int:
    """A field of `/proc/self/status`, such as VmRSS, RssAnon, RssFile or VmHWM."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KiB
    raise AssertionError(f"no {field} in {_STATUS}")


def _reset_peak() -> None:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        # Some sandboxes forbid it; the peak is then that of the whole process so far.
        return
