"""One part file at a time, from its first byte to its last.

`stream` goes through the source and writes wherever its bytes belong. Object stores take files in
order only, and tasks of a cluster write one file each: here each window of a file asks for the
ranges of the source that fill it. The same windows in the files of several ranks are filled
together, so that rows of which every rank takes a slice are read once.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import xxhash

from tightfit.sharding.copies import TensorCopies
from tightfit.sharding.gather import Gather
from tightfit.sharding.parts import Part
from tightfit.sharding.progress import Progress
from tightfit.sharding.stream.source_files import SourceFiles
from tightfit.sharding.stream.windows import (
    Constant,
    Operation,
    Read,
    Turned,
    clip,
    constants,
    fill,
    from_gather,
    from_group,
    reads_of,
    span,
)

WINDOW_BYTES = 2**21
TURNED_WINDOW_BYTES = 2**23
"""Each window of a transposition needs all rows of the source, so it has to be a large one."""
_AHEAD_BYTES = 12 * 2**20
_READERS = 8
_WRITERS = 3


class Sink(Protocol):
    """Takes the bytes of a file in order; a file that is open for writing, with any buffering."""

    def write(self, data: memoryview, /) -> object:
        """Take all of them, or raise, or say how many were taken."""


class Work(Protocol):
    """What parts are made of; a `ShardJob` and a `MergeJob` are."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The files."""

    @property
    def copies(self) -> tuple[TensorCopies, ...]:
        """Whose targets number the parts."""

    @property
    def gathers(self) -> tuple[Gather, ...]:
        """Whose targets number the parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartWork:
    """Everything that one file is made of: it can be sent to another process by itself."""

    part: Part
    operations: tuple[Operation | Constant, ...]

    @property
    def sources(self) -> frozenset[str]:
        """Names of the source files that it needs."""
        return frozenset(one.file for one in self.operations if not isinstance(one, Constant))


def plan_parts(job: Work) -> tuple[PartWork, ...]:
    """The work of a job, file by file, in the order of its parts."""
    found: defaultdict[int, list[Operation | Constant]] = defaultdict(list)
    for group in job.copies:
        for target, operation in from_group(group):
            found[target].append(operation)
    for gather in job.gathers:
        found[gather.target] += from_gather(gather)
    return tuple(
        PartWork(part=part, operations=(*constants(part), *found[number]))
        for number, part in enumerate(job.parts)
    )


def write_part(
    work: PartWork, files: SourceFiles, sink: Sink, progress: Progress
) -> dict[str, str]:
    """Write one file, in order, with some 30 MB of memory.

    The caller opens and closes the sink and removes what was begun if this fails; and calls
    `files.check_unchanged()` before it vouches for anything.

    Returns:
        The 128-bit XXH3 of each tensor, as in the manifest.

    Raises:
        CheckpointError: a source file cannot be read, or ends before its header says so.
        OSError: or whatever the sink raises.
    """
    return write_parts([work], files, [sink], progress)[0]


def write_parts(
    works: Sequence[PartWork], files: SourceFiles, sinks: Sequence[Sink], progress: Progress
) -> list[dict[str, str]]:
    """Write several files in step; ranges of the source that they share are read once."""
    hashes = [_Hashes(work.part) for work in works]

    def put(number: int, data: memoryview) -> int:
        hashes[number].update(data)
        _write_all(sinks[number], data)
        return len(data)

    with ThreadPoolExecutor(max_workers=min(len(works), _WRITERS)) as writers:
        for windows in _windows(works, files):
            # Each file gets its windows in order, because all wait for the slowest.
            tasks = [writers.submit(put, i, data) for i, data in enumerate(windows) if data]
            for task in tasks:
                progress.advance(task.result())
    return [one.digests() for one in hashes]


def _write_all(sink: Sink, data: memoryview) -> None:
    while data:
        taken = sink.write(data)
        if not isinstance(taken, int):
            return
        data = data[taken:]


def _windows(works: Sequence[PartWork], files: SourceFiles) -> Iterator[list[memoryview]]:
    """The files in windows: one of each at a time, empty for those that have ended.

    They are valid until the next ones are asked for.
    """
    ends = [work.part.nbytes for work in works]
    turns = any(isinstance(one, Turned) for work in works for one in work.operations)
    size = TURNED_WINDOW_BYTES if turns else WINDOW_BYTES
    starts = range(0, max(ends), size)
    placed = [_by_window(work.operations, size) for work in works]
    zeros = bytes(min(size, max(ends)))
    buffers = [bytearray(min(size, end)) for end in ends]

    def planned() -> Iterator[tuple[int, list[Read]]]:
        for number, start in enumerate(starts):
            clipped = [
                (i, one)
                for i, windows in enumerate(placed)
                for operation in windows.get(number, ())
                for one in clip(operation, start, min(start + size, ends[i]))
            ]
            yield number, reads_of(clipped)

    def flat() -> Iterator[tuple[int, Read | None]]:
        for number, reads in planned():
            for read in reads:
                yield number, read
            yield number, None

    with ThreadPoolExecutor(max_workers=_READERS) as readers:
        ahead = _ahead(flat(), files, readers)
        try:
            for number, read, data in ahead:
                start = number * size
                if read is None:
                    for i, window in enumerate(placed):
                        for constant in window.pop(number, ()):
                            if isinstance(constant, Constant):
                                constant.fill(buffers[i], start)
                    yield [
                        memoryview(buffer)[: max(0, end - start)]
                        for buffer, end in zip(buffers, ends, strict=True)
                    ]
                    for buffer in buffers:
                        # What nothing fills is padding.
                        buffer[:] = zeros[: len(buffer)]
                    continue
                for i, one in read.units:
                    fill(memoryview(buffers[i]), start, one, data, read.start)
        finally:
            readers.shutdown(wait=False, cancel_futures=True)


def _ahead(
    reads: Iterator[tuple[int, Read | None]], files: SourceFiles, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, Read | None, memoryview]]:
    """Read in the background as much as may be held, and give it back in order."""
    waiting: deque[tuple[int, Read | None, Future[bytes] | None]] = deque()
    held = 0

    def first() -> tuple[int, Read | None, memoryview]:
        nonlocal held
        number, read, future = waiting.popleft()
        data = future.result() if future is not None else b""
        held -= len(data)
        return number, read, memoryview(data)

    for number, read in reads:
        if read is None:
            waiting.append((number, None, None))
            continue
        while waiting and held + read.nbytes > _AHEAD_BYTES:
            yield first()
        held += read.nbytes
        future = pool.submit(files.read, read.file, read.start, read.stop)
        waiting.append((number, read, future))
    while waiting:
        yield first()


def _by_window(
    operations: Sequence[Operation | Constant], size: int
) -> dict[int, list[Operation | Constant]]:
    """By the numbers of the windows that they write to."""
    found: defaultdict[int, list[Operation | Constant]] = defaultdict(list)
    for operation in operations:
        first, last = span(operation)
        for number in range(first // size, (last - 1) // size + 1):
            found[number].append(operation)
    return dict(found)


class _Hashes:
    """The checksums of the tensors of a file that passes by in order."""

    def __init__(self, part: Part) -> None:
        self._placed = part.placed
        self._digests = [xxhash.xxh3_128() for _ in part.placed]
        self._at = self._first = 0

    def update(self, data: memoryview) -> None:
        start, stop = self._at, self._at + len(data)
        for i in range(self._first, len(self._placed)):
            one = self._placed[i]
            end = one.offset + one.tensor.nbytes
            if one.offset >= stop:
                break
            if end > start:
                self._digests[i].update(data[max(0, one.offset - start) : end - start])
            if end <= stop:
                self._first = i + 1
        self._at = stop

    def digests(self) -> dict[str, str]:
        return {
            one.tensor.name: digest.hexdigest()
            for one, digest in zip(self._placed, self._digests, strict=True)
        }
