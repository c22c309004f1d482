"""All parts of a job at once: one pass over the source, several tensors in flight."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack

from tightfit.sharding.progress import Progress
from tightfit.sharding.stream.carry import Carrier
from tightfit.sharding.stream.crew import Crew
from tightfit.sharding.stream.pending import Key, Pending, Task
from tightfit.sharding.stream.source_files import SourceFiles
from tightfit.sharding.stream.written import Target, Writer

Complete = list[tuple[Key, str]]
"""Tensors with their checksums."""


class _Member:
    def __init__(self, carrier: Carrier, writer: Writer) -> None:
        self._carrier, self._writer = carrier, writer

    def do(self, task: Task) -> Complete:
        for unit in task.units:
            self._carrier.carry(unit)
        return [(key, self._writer.checksum(key)) for key in task.keys]

    def stop(self) -> None:
        self._writer.stop()


def one_pass(
    pending: Pending, files: SourceFiles, fds: Sequence[int], progress: Progress
) -> Generator[tuple[Key, str], None, None]:
    """Write what is pending; `fds` are the parts, -1 for those that are not written.

    Close the iterator before the parts are closed or removed: nothing is written after it.

    Yields:
        Each tensor with its checksum as soon as it is complete.

    Raises:
        CheckpointError: a source file ends before its header says so.
        OSError: a part cannot be written.
    """
    with ExitStack() as stack:
        targets = [Target(fd) if fd >= 0 else None for fd in fds]
        for target in targets:
            if target is not None:
                stack.callback(target.close)
        constants = Writer(targets, pending, progress.advance)
        for key in pending.without_source():
            yield key, constants.checksum(key)
        crew: Crew[Task, Complete] = Crew()

        def member() -> _Member:
            writer = Writer(targets, pending, crew.advance)
            return _Member(Carrier(files, writer), writer)

        with crew.working(pending.tasks(), member):
            for complete in crew.results(progress.advance):
                yield from complete
