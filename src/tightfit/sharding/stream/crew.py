"""A few threads that carry out tasks, largest first, and report to the thread that waits for them.

Reading, writing and hashing give up the interpreter's lock, and a disk wants several requests at
once. Whatever ends the wait, an error in a thread or Ctrl-C, nothing is written after it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Generic, Protocol, TypeVar

_FEWEST, _MOST = 4, 8
_PATIENCE_SECONDS = 2.0
"""A thread that waits longer for a remote source is left alone: it cannot write any more."""

T = TypeVar("T")
R = TypeVar("R")
_In = TypeVar("_In", contravariant=True)
_Out = TypeVar("_Out", covariant=True)


class Member(Protocol[_In, _Out]):
    """What a thread works with."""

    def do(self, task: _In, /) -> _Out:
        """Carry out a task, in the thread."""

    def stop(self) -> None:
        """From another thread: return when nothing can be written any more."""


def crew_size(tasks: int) -> int:
    """Threads for so many tasks: also few processors can keep a disk busy with them."""
    return max(1, min(tasks, _MOST, max(_FEWEST, os.cpu_count() or 1)))


class Crew(Generic[T, R]):
    """Threads at work; `results` are what they have done, as it is done."""

    def __init__(self) -> None:
        self._reports: SimpleQueue[int | tuple[R] | BaseException | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._members: list[Member[T, R]] = []

    def advance(self, nbytes: int) -> None:
        """For members: so many bytes more are done."""
        self._reports.put(nbytes)

    @contextmanager
    def working(
        self, tasks: Sequence[T], make: Callable[[], Member[T, R]]
    ) -> Iterator["Crew[T, R]"]:
        """Begin, and stop in the end in any case."""
        left = list(reversed(tasks))
        try:
            for _ in range(crew_size(len(tasks))):
                member = make()
                self._members.append(member)
                thread = Thread(target=self._work, args=(member, left), daemon=True)
                self._threads.append(thread)
                thread.start()
            yield self
        finally:
            self._stop()

    def results(self, progress: Callable[[int], None]) -> Iterator[R]:
        """Results of tasks until all are done; errors of threads are raised here."""
        running = len(self._threads)
        while running:
            report = self._reports.get()
            if report is None:
                running -= 1
            elif isinstance(report, int):
                progress(report)
            elif isinstance(report, BaseException):
                raise report
            else:
                yield report[0]

    def _work(self, member: Member[T, R], left: list[T]) -> None:
        try:
            while True:
                try:
                    task = left.pop()
                except IndexError:
                    break
                self._reports.put((member.do(task),))
        except BaseException as error:
            self._reports.put(error)
        else:
            self._reports.put(None)

    def _stop(self) -> None:
        for member in self._members:
            while True:
                try:
                    member.stop()
                except KeyboardInterrupt:
                    # One more does not make it faster, and files are removed after this.
                    continue
                break
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_PATIENCE_SECONDS)
