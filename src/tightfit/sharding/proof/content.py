"""All that rank files hold, read at the speed of the disk: against checksums and against a source.

Several tensors are read at once: the kernel copies and xxhash computes without Python's lock.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import TypeVar

import xxhash

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.header import TensorInfo
from tightfit.checkpoint.source import Source
from tightfit.sharding.manifest import StoredFile, StoredTensor
from tightfit.sharding.progress import Progress, checksum
from tightfit.sharding.proof.compare import Read, equal
from tightfit.sharding.stream.source_files import BUFFER_BYTES, SourceFiles, unreadable

T = TypeVar("T")
R = TypeVar("R")

_MOST_READERS = 8
_BLOCK_BYTES, _BLOCKS = 2**20, 4


def in_threads(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    distant: bool = False,
    advance: "InTurn | None" = None,
) -> Iterator[R]:
    """Results in the order of the items; what has not begun is not done if nobody wants them.

    What is `distant` makes a thread wait rather than work. What has begun ends at the next progress
    that it reports by `advance`, if that is given.
    """
    with ThreadPoolExecutor(
        _MOST_READERS if distant else min(_MOST_READERS, os.cpu_count() or 1)
    ) as pool:
        try:
            yield from pool.map(work, items)
        except BaseException:
            # The pool waits for its threads, and a tensor may take half a minute.
            if advance is not None:
                advance.stop()
            raise


class InTurn:
    """Progress that several threads may report, until somebody stops them."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._lock, self._stopped = advance, Lock(), False

    def __call__(self, nbytes: int) -> None:
        """So many bytes more are done.

        Raises:
            CancelledError: nobody wants to know any more.
        """
        if self._stopped:
            raise CancelledError
        with self._lock:
            self._advance(nbytes)

    def stop(self) -> None:
        """Let every thread end at what it reports next."""
        self._stopped = True


def damages(place: Source, files: Iterable[StoredFile], progress: Progress) -> Iterator[str]:
    """Tensors that are not what their checksums say."""
    files = tuple(files)
    progress.phase("checksums", _total(files))
    advance = InTurn(progress.advance)

    def damage(there: SourceFiles, file: StoredFile, tensor: StoredTensor) -> str | None:
        found = checksum_in(there, file.name, tensor.offset, tensor.nbytes, advance)
        if found == tensor.xxh3:
            return None
        return f"{file.name}: {tensor.name!r} is damaged (its checksum differs)"

    yield from _each_tensor(place, files, damage, advance)


def differences(
    place: Source, files: Iterable[StoredFile], source: Checkpoint, progress: Progress
) -> Iterator[str]:
    """Tensors that are not made of the source's, byte by byte."""
    files, tensors = tuple(files), source.tensors()
    progress.phase("comparing", _total(files))
    advance = InTurn(progress.advance)
    with SourceFiles(source.source) as source_files:
        for name in _sources(files, tensors):
            # Once, before several threads ask for it.
            source_files.descriptor(name)

        def difference(there: SourceFiles, file: StoredFile, tensor: StoredTensor) -> str | None:
            missing = [p.source for p in tensor.pieces if p.source not in tensors]
            read = _until_stopped(_reader(there, place, file), advance)
            same = not missing and equal(read, tensor, tensors, source_files)
            advance(tensor.nbytes)
            if missing:
                return f"{source.name} lacks {missing[0]!r}, from which {tensor.name!r} was made"
            return None if same else f"{file.name}: {tensor.name!r} differs from {source.name}"

        yield from _each_tensor(place, files, difference, advance)


def _each_tensor(
    place: Source,
    files: Iterable[StoredFile],
    check: Callable[[SourceFiles, StoredFile, StoredTensor], str | None],
    advance: InTurn,
) -> Iterator[str]:
    with SourceFiles(place) as there:
        distant = None in [there.descriptor(file.name) for file in files]
        items = [(file, tensor) for file in files for tensor in file.tensors]
        found = in_threads(lambda one: check(there, *one), items, distant=distant, advance=advance)
        yield from filter(None, found)


def _reader(files: SourceFiles, place: Source, file: StoredFile) -> Callable[[int, int], bytes]:
    """Reads of a file; of a distant one small ones come out of larger blocks."""
    read = partial(files.read, file.name)
    if files.descriptor(file.name) is not None:
        return read
    size, blocks = place.size(file.name), OrderedDict[int, bytes]()

    def block(number: int) -> bytes:
        if number not in blocks:
            blocks[number] = read(number * _BLOCK_BYTES, min((number + 1) * _BLOCK_BYTES, size))
            if len(blocks) > _BLOCKS:
                blocks.popitem(last=False)
        return blocks[number]

    def through_blocks(start: int, stop: int) -> bytes:
        if stop - start > _BLOCK_BYTES:
            return read(start, stop)
        numbers = range(start // _BLOCK_BYTES, -(-stop // _BLOCK_BYTES))
        first = start // _BLOCK_BYTES * _BLOCK_BYTES
        return b"".join(map(block, numbers))[start - first : stop - first]

    return through_blocks


def _until_stopped(read: Read, advance: InTurn) -> Read:
    def one(start: int, stop: int) -> bytes:
        advance(0)
        return read(start, stop)

    return one


def checksum_in(
    files: SourceFiles, name: str, offset: int, nbytes: int, advance: Callable[[int], None]
) -> str:
    """The 128-bit XXH3 of a range of a file, local or distant.

    Raises:
        CheckpointError: the file cannot be read.
    """
    fd = files.descriptor(name)
    if fd is not None:
        try:
            return checksum(fd, offset, nbytes, advance)
        except OSError as error:
            raise unreadable(name, error) from error
    digest = xxhash.xxh3_128()
    for at in range(offset, offset + nbytes, BUFFER_BYTES):
        data = files.read(name, at, min(at + BUFFER_BYTES, offset + nbytes))
        digest.update(data)
        advance(len(data))
    return digest.hexdigest()


def _sources(files: Iterable[StoredFile], tensors: Mapping[str, TensorInfo]) -> list[str]:
    names = {p.source for file in files for tensor in file.tensors for p in tensor.pieces}
    return sorted({tensors[name].file for name in names if name in tensors})


def _total(files: Iterable[StoredFile]) -> int:
    return sum(tensor.nbytes for file in files for tensor in file.tensors)
