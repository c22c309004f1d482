"""The parts of a job as tasks that an executor spreads over processes or machines.

The output directory is shared. Each attempt at a part writes a file of its own, in a directory of
the rank that lives only as long as the call, and the caller takes over what is whole. So an attempt
that is cut off from the rest and still runs can neither touch a file that counts, nor leave one
behind.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from tightfit.checkpoint.disk import is_about, output_error, reserve
from tightfit.checkpoint.source import Source
from tightfit.errors import CheckpointError, OutputError
from tightfit.executors import Advance, Executor
from tightfit.sharding.job import Job
from tightfit.sharding.origin import States
from tightfit.sharding.output import ShardOutput
from tightfit.sharding.parts import Checksums, Part
from tightfit.sharding.progress import Progress, checksum
from tightfit.sharding.stream.by_part import PartWork, plan_parts, write_part
from tightfit.sharding.stream.source_files import SourceFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all tasks have to know; `left` says what an error leaves behind."""

    source: Source
    sources: States
    left: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteTask:
    """A part to be written to a new file in `directory`."""

    work: PartWork
    directory: Path

    @property
    def name(self) -> str:
        """The file."""
        return self.work.part.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ProveTask:
    """A file that an earlier call has left, and that may hold all of a part."""

    part: Part
    path: Path

    @property
    def name(self) -> str:
        """The file."""
        return self.part.name


def spread(
    job: Job,
    output: ShardOutput,
    noted: Mapping[tuple[str, str], str],
    sources: States,
    progress: Progress,
    executor: Executor,
) -> Checksums:
    """Write the parts of a started output, those that are proven to be there excepted.

    Returns:
        The checksums of all their tensors.

    Raises:
        CheckpointError: a source file is truncated, or another one elsewhere.
        OutputError: a file cannot be written, or its directory is not shared.
        TaskLostError: the workers of a task died, again and again.
    """
    shared = Shared(source=job.checkpoint.source, sources=sources, left=output.left)
    todo = {part.name for part in output.todo()}
    works = [work for work in plan_parts(job) if work.part.name in todo]
    found: Checksums = {}

    def proven(part: Part, digests: Mapping[str, str]) -> None:
        keys = {(part.name, name): digest for name, digest in digests.items()}
        if all(noted[key] == digest for key, digest in keys.items()):
            found.update(keys)
            todo.discard(part.name)

    begun = [work.part for work in works if output.begun(work.part)]
    checks = [
        ProveTask(part=part, path=_absolute(output.partial(part)))
        for part in begun
        if all((part.name, one.tensor.name) in noted for one in part.placed)
    ]
    if checks:
        progress.phase("checking", sum(check.part.nbytes for check in checks))
        executor.run(
            prove,
            shared,
            checks,
            done=lambda number, digests: proven(checks[number].part, digests),
            advance=progress.advance,
        )
    tasks = [
        WriteTask(work=work, directory=_absolute(output.attempts(work.part.rank.rank).path))
        for work in works
        if work.part.name in todo
    ]
    for rank in output.ranks:
        output.attempts(rank).make()

    def written(part: Part, result: tuple[str, Mapping[str, str]]) -> None:
        output.take(part, result[0])
        for name, digest in result[1].items():
            found[part.name, name] = digest
            output.note(part, name, digest)

    progress.phase("copying", sum(task.work.part.nbytes for task in tasks))
    executor.run(
        write,
        shared,
        tasks,
        done=lambda number, result: written(tasks[number].work.part, result),
        advance=progress.advance,
    )
    return found


def write(shared: Shared, task: WriteTask, advance: Advance) -> tuple[str, Mapping[str, str]]:
    """Write a part; returns the name of its file and the checksums of its tensors."""
    part = task.work.part
    path = task.directory / f"{part.name}.{uuid4().hex}.partial"
    # 0666, which the umask restricts: servers run as other users.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with SourceFiles(shared.source) as files:
            _check_sources(shared, task.work)
            try:
                descriptor = os.open(path, flags, 0o666)
            except FileNotFoundError:
                raise OutputError(
                    f"{task.directory.parent} is not the directory of that name where tightfit "
                    "was started",
                    hint="give a directory that all machines of the cluster share",
                ) from None
            with open(descriptor, "wb", buffering=0) as file:
                reserve(descriptor, part.nbytes)
                digests = write_part(task.work, files, file, _Bars(advance))
                files.check_unchanged()
                os.fsync(descriptor)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(path)
        if isinstance(error, OSError):
            raise _told(error, task.directory.parent / part.name, part, shared) from error
        raise
    return path.name, digests


def prove(shared: Shared, task: ProveTask, advance: Advance) -> Mapping[str, str]:
    """The checksums of what a file holds in the places of the tensors of a part."""
    part = task.part
    try:
        with open(task.path, "rb", buffering=0) as file:
            header = file.read(len(part.header))
            advance(len(header))
            found = {
                one.tensor.name: checksum(file.fileno(), one.offset, one.tensor.nbytes, advance)
                for one in part.placed
            }
            # It gets its name as it is, and who wrote it may have died before bringing it to disk.
            os.fsync(file.fileno())
    except OSError as error:
        raise _told(error, task.path, part, shared) from error
    return found if header == part.header else dict.fromkeys(found, "")


def _check_sources(shared: Shared, work: PartWork) -> None:
    """Machines with copies of the model of their own may hold another one."""
    for name in sorted(work.sources):
        state, size = shared.sources[name], shared.source.size(name)
        if state is not None and size != state[0]:
            raise CheckpointError(
                f"{shared.source.label}: {name!r} has {size:,} bytes, and {state[0]:,} where "
                "tightfit was started",
                hint="all machines of the cluster need the same model at the same path",
            )


def _told(error: OSError, path: Path, part: Part, shared: Shared) -> OutputError | CheckpointError:
    if is_about(error, path.parent):
        return output_error(error, path, part.nbytes, left=shared.left)
    return CheckpointError(
        f"cannot read {error.filename or shared.source.label}: {error.strerror or error}",
        hint="check the path, its permissions and the health of the disk",
    )


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


@dataclass(frozen=True, slots=True)
class _Bars:
    """Progress without phases."""

    advance: Callable[[int], None]

    def phase(self, name: str, total_bytes: int) -> None:
        """Ignore."""
