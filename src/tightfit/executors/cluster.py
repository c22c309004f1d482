"""Tasks on the machines of a Ray cluster.

Ray would repeat lost tasks by itself, silently; here each loss is told, counted, and the bytes that
it undid are taken out of the progress. What a task raises travels as its words, so that no
traceback of Ray's reaches the user, and a machine that lacks tightfit can say so.
"""

import io
import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tightfit import __version__, errors
from tightfit.errors import TaskLostError, TightfitError, UsageError
from tightfit.executors import Advance
from tightfit.executors.worker import Board, Report, Reports, make_carry_out

MOST_ATTEMPTS = 4
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 3.0
_CONNECT_SECONDS = 10.0

_NODES_SECONDS = 1.0


class RayExecutor:
    """A connection to a cluster, or to one of this machine alone; made when it is needed first.

    Raises:
        UsageError: (`run`) there is no cluster at the address.
    """

    def __init__(self, address: str | None, notice: Callable[[str], None]) -> None:
        self._address, self._notice = address, notice
        self._stack = ExitStack()
        self._silent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def run(
        self,
        work: Callable[[Any, Any, Advance], Any],
        shared: Any,
        tasks: Sequence[Any],
        *,
        done: Callable[[int, Any], None],
        advance: Advance,
    ) -> None:
        """Carry out all, on all machines alike."""
        if not tasks:
            return
        if not self._silent:
            # Ray tells there of every worker that dies, from a thread, and cannot be told not to.
            self._stack.enter_context(redirect_stdout(_Nowhere()))
            self._silent = True
        if not ray.is_initialized():
            self._stack.callback(ray.shutdown)
            with _own_signals():
                self._connect()
        run = _Run(work, shared, tasks, advance, self._notice)
        try:
            run.all(done)
        except BaseException:
            run.stop()
            # The end of our connection is the end of its workers.
            self._stack.close()
            self._silent = False
            raise
        run.stop()

    def _connect(self) -> None:
        # A cluster that is started here must not ask or tell anything on our stdout.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = self._address or os.environ.get("RAY_ADDRESS")
        try:
            _require_listener(address)
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False,
            )
        except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
            raise UsageError(
                f"cannot use a Ray cluster at {address or 'this machine'}: {_first_line(error)}",
                hint="check --ray-address (host:6379, auto or local), and that both sides have the "
                "same versions of Python and Ray",
            ) from error


def _require_listener(address: str | None) -> None:
    """Ray itself tries for minutes, and tells of each attempt.

    Raises:
        OSError: nobody answers at HOST:PORT.
    """
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "//" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()


class _Run:
    """The tasks of one call of `run`."""

    def __init__(
        self,
        work: Callable[[Any, Any, Advance], Any],
        shared: Any,
        tasks: Sequence[Any],
        advance: Advance,
        notice: Callable[[str], None],
    ) -> None:
        self._tasks, self._advance, self._notice = tasks, advance, notice
        self._attempts = [0] * len(tasks)
        self._losses = [0] * len(tasks)
        self._shown = [0] * len(tasks)
        self._running: dict[Any, int] = {}
        self._reports: Reports = {}
        self._dead = _dead_nodes()
        self._nodes_at = time.monotonic()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._board = (
            ray.remote(Board)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
            .remote()
        )
        self._poll = self._board.reports.remote()
        # Once for all tasks, in the object store of each machine.
        self._shared = ray.put(pickle.dumps((work, shared)))
        self._carry_out = ray.remote(make_carry_out()).options(
            num_cpus=1, max_retries=0, scheduling_strategy="SPREAD"
        )
        for number in range(len(tasks)):
            self._submit(number)

    def all(self, done: Callable[[int, Any], None]) -> None:
        while self._running:
            if time.monotonic() - self._nodes_at > _NODES_SECONDS:
                self._nodes_at = time.monotonic()
                self._leave_nodes(_dead_nodes() - self._dead)
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=_POLL_SECONDS)
            self._show_reports()
            for ref in ready:
                number = self._running.pop(ref)
                try:
                    answer, data, nbytes = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    # An error that nobody foresaw keeps its traceback.
                    raise error.as_instanceof_cause() from None
                except ray.exceptions.RayError as error:
                    self._show_reports(wait=True)
                    self._lost(number, _first_line(error))
                    continue
                if answer == "failed":
                    raise _error(*data)
                if answer == "stopped":
                    self._lost(number, "it was told to stop")
                    continue
                self._show(number, nbytes)
                done(number, pickle.loads(data))

    def stop(self) -> None:
        """Let what still runs or waits find out that nobody wants it any more."""
        # Not by `ray.cancel`: if a task ends at that moment, Ray 2.60 aborts this process.
        with suppress(ray.exceptions.RayError):
            ray.kill(self._board)

    def _submit(self, number: int) -> None:
        self._attempts[number] += 1
        self._board.expect.remote(number, self._attempts[number])
        ref = self._carry_out.remote(
            self._shared,
            pickle.dumps(self._tasks[number]),
            __version__,
            self._board,
            number,
            self._attempts[number],
        )
        self._running[ref] = number

    def _lost(self, number: int, why: str) -> None:
        report = self._report(number)
        where = f"on {report.node} " if report is not None else ""
        self._show(number, 0)
        self._losses[number] += 1
        name = self._tasks[number].name
        if self._losses[number] == MOST_ATTEMPTS:
            raise TaskLostError(
                f"{name} was given up: it was lost with {MOST_ATTEMPTS} workers, of which the last "
                f"one {where}died ({why})",
                hint="Ray's logs there may say why (its memory?); --resume goes on with the rest",
            )
        self._notice(
            f"{name} was lost, as its worker {where}died; doing it again "
            f"(attempt {self._losses[number] + 1} of {MOST_ATTEMPTS})"
        )
        self._submit(number)

    def _leave_nodes(self, dead: set[str]) -> None:
        """Do again what was on machines that are gone.

        Ray itself waits for minutes if nothing closes the connections: a machine without power, or
        cut off.
        """
        if not dead:
            return
        self._dead |= dead
        self._show_reports(wait=True)
        for ref, number in list(self._running.items()):
            report = self._report(number)
            if report is not None and report.node_id not in dead:
                continue
            del self._running[ref]
            if report is None:
                # Waiting, most likely, but perhaps for one of these.
                self._submit(number)
            else:
                self._lost(number, "its machine is gone")

    def _report(self, number: int) -> Report | None:
        """What the newest attempt at a task has told."""
        report = self._reports.get(number)
        return report if report and report.attempt == self._attempts[number] else None

    def _show_reports(self, *, wait: bool = False) -> None:
        if wait:
            # The one that is under way may be older than what it is asked about.
            self._poll = self._board.reports.remote()
        ready, _ = ray.wait([self._poll], timeout=_REPORT_SECONDS if wait else 0)
        if ready:
            with suppress(ray.exceptions.RayError):
                # Without the board there is less to see, and nothing less is done.
                self._reports = ray.get(self._poll)
            self._poll = self._board.reports.remote()
        for number in self._running.values():
            report = self._report(number)
            if report is not None:
                self._show(number, report.nbytes)

    def _show(self, number: int, nbytes: int) -> None:
        if nbytes != self._shown[number]:
            self._advance(nbytes - self._shown[number])
            self._shown[number] = nbytes


class _Nowhere(io.TextIOBase):
    """A stream that takes everything."""

    def write(self, text: str, /) -> int:
        return len(text)


def _dead_nodes() -> set[str]:
    try:
        return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    except Exception:
        # Asked again soon; and who cannot be asked at all ends the tasks as well.
        return set()


def _error(kind: str, message: str, hint: str | None) -> TightfitError:
    """An error of ours again; those with arguments of their own are told by their words alone."""
    found = getattr(errors, kind, TightfitError)
    error: TightfitError = found.__new__(found)
    TightfitError.__init__(error, message, hint=hint)
    return error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray's way to end is not ours: Ctrl-C and SIGTERM have to tidy up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    except SystemExit:
        # What Ray makes of a SIGTERM that comes while it starts.
        raise KeyboardInterrupt from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
