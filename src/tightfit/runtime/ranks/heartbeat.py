"""Signs of life, by which a launcher notices ranks that hang.

Every rank touches a file of its own each second, from a thread. A process that is stopped, or stuck
in a driver or on a disk, does not; one that waits for another rank does, so that the one who hangs
is found, and not those who wait for it.
"""

import atexit
import json
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tightfit.errors import RankFailedError, UsageError

RANK_TIMEOUT = "TIGHTFIT_RANK_TIMEOUT"
"""The variable with the seconds after which a silent rank is taken for dead."""
_DIRECTORY = "TIGHTFIT_HEARTBEATS"
_BEAT_SECONDS = 1.0
_TIMEOUT_SECONDS = 20.0


def seconds_from(variable: str, default: float) -> float:
    """A time limit that an environment variable may set.

    Raises:
        UsageError: it is set to something else.
    """
    text = os.environ.get(variable) or str(default)
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise UsageError(f"{variable} is {text!r}", hint="a number of seconds, or leave it unset")


def beat() -> None:
    """Give signs of life from now on, if the launcher of this rank looks for them."""
    directory = os.environ.get(_DIRECTORY)
    if directory is None:
        return
    path = Path(directory, f"{os.environ['RANK']}.{os.getpid()}")
    path.touch()
    # Who has ended in good order is silent too.
    atexit.register(path.unlink, missing_ok=True)

    def touch() -> None:
        with suppress(FileNotFoundError):
            while True:
                time.sleep(_BEAT_SECONDS)
                os.utime(path)

    threading.Thread(target=touch, name="heartbeat", daemon=True).start()


def introduction() -> bytes:
    """What `Neighbours` need to know of this process: where it can be seen, and its number."""
    where = platform.node()
    if sys.platform == "linux":
        where += os.readlink("/proc/self/ns/pid")
    return json.dumps([where, os.getpid()]).encode()


class Neighbours:
    """The processes of the other ranks on this machine, which see each other end.

    Args:
        told: the introductions of all ranks.
        rank: this one.
    """

    def __init__(self, told: Sequence[bytes], rank: int) -> None:
        everybody = [json.loads(one) for one in told]
        self._processes = {
            other: process
            for other, (where, process) in enumerate(everybody)
            if other != rank and where == everybody[rank][0]
        }

    def require_alive(self) -> None:
        """Look for them.

        Raises:
            RankFailedError: one has ended.
        """
        for rank, process in self._processes.items():
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                message = f"rank {rank} died"
                hint = "its own message says why; if there is none, dmesg may"
                raise RankFailedError(message, hint=hint) from None
            except PermissionError:  # it lives
                pass


class Watch:
    """Kills ranks that are silent; `hung` are those, by number."""

    def __init__(self, directory: Path) -> None:
        self.hung: list[int] = []
        self.seconds = seconds_from(RANK_TIMEOUT, _TIMEOUT_SECONDS)
        self._directory = directory
        self._interval = min(_BEAT_SECONDS, self.seconds / 4)
        self._seen: dict[str, tuple[int, float]] = {}

    def run(self, ended: threading.Event) -> None:
        """Look until the job has ended."""
        last = time.monotonic()
        while not ended.wait(self._interval):
            now = time.monotonic()
            if now - last > self._interval + _BEAT_SECONDS:
                # This process, or the machine, was stopped itself.
                self._seen.clear()
            last = now
            with suppress(FileNotFoundError):
                for entry in os.scandir(self._directory):
                    self._look(entry.name, entry.stat().st_mtime_ns, now)

    def _look(self, name: str, touched: int, now: float) -> None:
        before, since = self._seen.get(name, (None, now))
        if touched != before:
            self._seen[name] = touched, now
        elif now - since > self.seconds:
            rank, pid = map(int, name.split("."))
            if rank not in self.hung and _kill(pid):
                self.hung.append(rank)


@contextmanager
def watched_ranks() -> Iterator[Watch]:
    """Look after the ranks that are started in here.

    Raises:
        UsageError: TIGHTFIT_RANK_TIMEOUT is not a number.
    """
    ended = threading.Event()
    with tempfile.TemporaryDirectory(prefix="tightfit-", ignore_cleanup_errors=True) as directory:
        watch = Watch(Path(directory))
        thread = threading.Thread(target=watch.run, args=(ended,), daemon=True)
        os.environ[_DIRECTORY] = directory
        thread.start()
        try:
            yield watch
        finally:
            ended.set()
            thread.join()
            del os.environ[_DIRECTORY]


def _kill(pid: int) -> bool:
    """End a rank; False if it has ended already, whoever has its number by now."""
    with suppress(ChildProcessError, ProcessLookupError):
        if sys.platform == "linux":
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                return False
        os.kill(pid, signal.SIGKILL)
        return True
    return False
