"""What runs on the machines of a Ray cluster: the tasks, and the board that hears of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Report:
    """What a task has told: which attempt it is, where it runs, and how many bytes are done."""

    attempt: int = 0
    node_id: str = ""
    address: str = ""
    nbytes: int = 0

    @property
    def node(self) -> str:
        """The machine, for messages."""
        return f"{self.address} (node {self.node_id[:8]})"


Reports = dict[int, Report]

Answer = tuple[str, Any, int]
"""`done` and the pickled result; `failed` and an error's class, message and hint; or `stopped`."""


class Board:
    """An actor that hears how far each task is, and where, and tells lost ones to stop."""

    def __init__(self) -> None:
        self._reports: Reports = {}
        self._expected: dict[int, int] = {}

    def expect(self, number: int, attempt: int) -> None:
        """Earlier attempts at this task are to stop."""
        self._expected[number] = attempt

    def tell(self, number: int, attempt: int, node_id: str, address: str, nbytes: int) -> bool:
        """How far an attempt is; False if it is to stop."""
        if attempt < self._expected.get(number, 0):
            return False
        self._reports[number] = Report(attempt, node_id, address, nbytes)
        return True

    def reports(self) -> Reports:
        """By task."""
        return self._reports


def make_carry_out() -> Callable[..., Answer]:
    """What the machines run: a function that travels by value, and runs where tightfit is not."""

    def carry_out(
        shared: bytes, task: bytes, version: str, board: Any, number: int, attempt: int
    ) -> Answer:
        import pickle
        import time

        import ray

        node_id = ray.get_runtime_context().get_node_id()
        address = ray.util.get_node_ip_address()
        node = f"{address} (node {node_id[:8]})"

        class StoppedError(BaseException):
            pass

        def report(nbytes: int) -> None:
            # Who is cut off waits here, and who is not wanted any more ends.
            try:
                wanted = ray.get(board.tell.remote(number, attempt, node_id, address, nbytes))
            except ray.exceptions.RayError:
                wanted = False
            if not wanted:
                raise StoppedError

        hint = f"pip install tightfit=={version} on every machine of the cluster"
        try:
            import tightfit
            from tightfit.errors import TightfitError

            if tightfit.__version__ != version:
                message = f"{node} has tightfit {tightfit.__version__}, and not {version}"
                return "failed", ("UsageError", message, hint), 0
            work, common = pickle.loads(shared)
            one = pickle.loads(task)
        except ImportError as error:
            message = f"{node} cannot import what tightfit needs: {error}"
            return "failed", ("UsageError", message, hint), 0
        total, told = 0, time.monotonic()

        def advance(nbytes: int) -> None:
            nonlocal total, told
            total += nbytes
            now = time.monotonic()
            if now - told > 0.2:
                told = now
                report(total)

        try:
            report(0)
            result = work(common, one, advance)
        except StoppedError:
            return "stopped", None, total
        except TightfitError as error:
            return "failed", (type(error).__name__, f"{node}: {error.message}", error.hint), total
        return "done", pickle.dumps(result), total

    return carry_out
