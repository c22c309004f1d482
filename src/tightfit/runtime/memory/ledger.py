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
from tightfit.runtime.loading.pages import PAGES
from tightfit.units import KiB, MiB

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_MAPS, _SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")
_WEIGHTS = ".safetensors"
_RESET_PEAK = "5"

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Memory of one phase; all figures are absolute.

    `code_*` are pages of files that are no weights: the kernel drops what of libraries has not been
    used for a while, and reads it again, in whatever phase that happens.
    """

    before_bytes: int
    after_bytes: int
    peak_bytes: int
    code_before_bytes: int = 0
    code_after_bytes: int = 0

    @property
    def kept_bytes(self) -> int:
        """What the phase allocated and did not free."""
        code = self.code_after_bytes - self.code_before_bytes
        return self.after_bytes - self.before_bytes - code

    @property
    def transient_bytes(self) -> int:
        """What the phase needed at its peak beyond what there was before."""
        return self.highest_bytes - (self.before_bytes - self.code_before_bytes)

    @property
    def highest_bytes(self) -> int:
        """The peak, without code."""
        return self.peak_bytes - self.code_after_bytes


class MemoryLedger(Protocol):
    """Phases of a run by name, in order."""

    readings: dict[str, Reading]

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measure what happens inside; a name may be used once."""
        ...

    def resident_bytes(self) -> int:
        """What is in use now."""
        ...

    def release(self) -> None:
        """Give back what allocators keep for later."""
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
        before, code_before = self.resident_bytes(), _code_bytes()
        yield
        peak = max(status_bytes("VmHWM"), self.resident_bytes())
        self._settle()
        self.readings[name] = Reading(
            before_bytes=before,
            after_bytes=self.resident_bytes(),
            peak_bytes=peak,
            code_before_bytes=code_before,
            code_after_bytes=_code_bytes(),
        )

    def resident_bytes(self) -> int:
        """Anonymous and file pages; shared memory is counted too."""
        return status_bytes("VmRSS")

    def release(self) -> None:
        """Give freed blocks back to the kernel."""
        self._settle()

    def _settle(self) -> None:
        if hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)
        PAGES.restore()


def status_bytes(field: str) -> int:
    """A field of `/proc/self/status`, such as VmRSS, RssAnon, RssFile or VmHWM."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KiB
    raise AssertionError(f"no {field} in {_STATUS}")


def _code_bytes() -> int:
    """Resident pages of files but those of weights, which may be used where they lie."""
    weights, of_weights = 0, False
    if _WEIGHTS in _MAPS.read_text():
        for line in _SMAPS.read_text().splitlines():
            if line.startswith("Rss:"):
                weights += int(line.split()[1]) * KiB if of_weights else 0
            elif not line.split(" ", 1)[0].endswith(":"):
                of_weights = line.endswith(_WEIGHTS)
    return status_bytes("RssFile") - weights


def _reset_peak() -> None:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        # Some sandboxes forbid it; the peak is then that of the whole process so far.
        return
