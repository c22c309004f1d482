"""All that rank files hold, read at the speed of the disk: against checksums and against a source.

Several tensors are read at once: the kernel copies and xxhash computes without Python's lock.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import TypeVar

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.header import TensorInfo
from tightfit.sharding.compare import equal
from tightfit.sharding.manifest import StoredFile, StoredTensor
from tightfit.sharding.progress import Progress, checksum
from tightfit.sharding.stream import SourceFiles

T = TypeVar("T")
R = TypeVar("R")

_MOST_READERS = 8


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in the order of the items; what has not begun is not done if nobody wants them."""
    with ThreadPoolExecutor(min(_MOST_READERS, os.cpu_count() or 1)) as pool:
        yield from pool.map(work, items)


def in_turn(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Progress that several threads may report."""
    lock = Lock()

    def one_by_one(nbytes: int) -> None:
        with lock:
            advance(nbytes)

    return one_by_one


def damages(directory: Path, files: Iterable[StoredFile], progress: Progress) -> Iterator[str]:
    """Tensors that are not what their checksums say."""
    files = tuple(files)
    progress.phase("checksums", _total(files))
    advance = in_turn(progress.advance)

    def damage(one: tuple[int, StoredFile, StoredTensor]) -> str | None:
        fd, file, tensor = one
        if checksum(fd, tensor.offset, tensor.nbytes, advance) == tensor.xxh3:
            return None
        return f"{file.name}: {tensor.name!r} is damaged (its checksum differs)"

    yield from _each_tensor(directory, files, damage)


def differences(
    directory: Path, files: Iterable[StoredFile], source: Checkpoint, progress: Progress
) -> Iterator[str]:
    """Tensors that are not made of the source's, byte by byte."""
    files, tensors = tuple(files), source.tensors()
    progress.phase("comparing", _total(files))
    advance = in_turn(progress.advance)
    with SourceFiles(source.source) as source_files:
        for name in _sources(files, tensors):
            # Once, before several threads ask for it.
            source_files.descriptor(name)

        def difference(one: tuple[int, StoredFile, StoredTensor]) -> str | None:
            fd, file, tensor = one
            missing = [p.source for p in tensor.pieces if p.source not in tensors]
            same = not missing and equal(fd, tensor, tensors, source_files)
            advance(tensor.nbytes)
            if missing:
                return f"{source.name} lacks {missing[0]!r}, from which {tensor.name!r} was made"
            return None if same else f"{file.name}: {tensor.name!r} differs from {source.name}"

        yield from _each_tensor(directory, files, difference)


def _each_tensor(
    directory: Path,
    files: Iterable[StoredFile],
    check: Callable[[tuple[int, StoredFile, StoredTensor]], str | None],
) -> Iterator[str]:
    with ExitStack() as stack:
        items = []
        for file in files:
            fd = stack.enter_context(open(directory / file.name, "rb")).fileno()
            items += [(fd, file, tensor) for tensor in file.tensors]
        yield from filter(None, in_threads(check, items))


def _sources(files: Iterable[StoredFile], tensors: Mapping[str, TensorInfo]) -> list[str]:
    names = {p.source for file in files for tensor in file.tensors for p in tensor.pieces}
    return sorted({tensors[name].file for name in names if name in tensors})


def _total(files: Iterable[StoredFile]) -> int:
    return sum(tensor.nbytes for file in files for tensor in file.tensors)
