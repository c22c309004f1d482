"""Who carries out independent tasks: this process, or the machines of a cluster.

Nothing here knows what the tasks are about. A task that is lost with its worker is done again, from
the beginning and perhaps while the lost one still runs somewhere, cut off: work has to be such that
two attempts at a task never write to the same file.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from tightfit.errors import MissingExtraError, UsageError

EXECUTORS = ("local", "ray")

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

Advance = Callable[[int], None]
"""Told of bytes that are done; of negative ones where the work of a lost attempt is gone."""

Work = Callable[[S, T, Advance], R]
"""A function of a module: what all tasks share, the task, and whom to tell of progress."""


class Executor(Protocol):
    """Carries out tasks, in any order."""

    def run(
        self,
        work: Work[S, T, R],
        shared: S,
        tasks: Sequence[T],
        *,
        done: Callable[[int, R], None],
        advance: Advance,
    ) -> None:
        """Carry out all; `done` gets the number of each task and its result, in this process.

        `shared`, tasks and results can be pickled, and tasks have a `name` for messages.

        Raises:
            TightfitError: what a task or `done` has raised; the others are cancelled.
            TaskLostError: the workers of a task died, again and again.
        """


@contextmanager
def open_executor(
    name: str, command: str, *, ray_address: str | None = None, notice: Callable[[str], None]
) -> Iterator[Executor | None]:
    """The executor of a name; None for `local`, where one pass over the source does everything.

    Args:
        command: that asks for it, for messages.
        ray_address: of the cluster, or where Ray finds one by itself; else one is started here.
        notice: told what the user should know though the work goes on.

    Raises:
        UsageError: there is no such executor, or no cluster at the address.
        MissingExtraError: Ray is not installed.
    """
    if name not in EXECUTORS:
        raise UsageError(
            f"there is no executor {name!r}", hint=f"--executor {' or '.join(EXECUTORS)}"
        )
    if name == "local":
        if ray_address is not None:
            raise UsageError(
                f"--ray-address {ray_address} is of no use without Ray", hint="add --executor ray"
            )
        yield None
        return
    try:
        import ray  # noqa: F401
    except ImportError:
        raise MissingExtraError(f"{command} --executor ray", "ray", "ray") from None
    from tightfit.executors.cluster import RayExecutor

    with RayExecutor(ray_address, notice) as executor:
        yield executor
