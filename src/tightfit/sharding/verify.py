"""`tightfit verify`: is a sharded checkpoint what its manifest says, and what its source holds?"""

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.describe import require_weights
from tightfit.checkpoint.header import TensorInfo, read_header
from tightfit.checkpoint.source import safe_name
from tightfit.errors import CheckpointError, TightfitError, VerificationError
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel
from tightfit.model.stored import rank_tensors, stored_layout
from tightfit.sharding.manifest import Manifest, StoredFile, StoredTensor, read_manifest
from tightfit.sharding.shard import Progress, checksum
from tightfit.sharding.stream import BUFFER_BYTES, SourceFiles
from tightfit.units import dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was checked, and every difference that was found."""

    manifest: Manifest
    tensors: int
    nbytes: int
    compared_with_source: bool
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """No problem was found."""
        return not self.problems


def verify(
    directory: Path, config: dict[str, object], progress: Progress, against: Checkpoint | None
) -> Report:
    """Check structure and checksums, and with `against` every byte.

    Raises:
        VerificationError: there is no readable manifest.
        CheckpointError: `against` has no weights.
    """
    manifest = read_manifest(directory)
    if against is not None:
        require_weights(against, "verify")
    problems = list(_structure(directory, config, manifest))
    good: list[StoredFile] = []
    for file in manifest.files:
        found = list(_file_structure(directory, file))
        problems += found
        if not found:
            good.append(file)
    total = sum(tensor.nbytes for file in good for tensor in file.tensors)
    progress.phase("checksums", total)
    for file in good:
        problems += _content(directory, file, progress)
    if against is not None:
        progress.phase("comparing", total)
        problems += _against(directory, good, against, progress)
    return Report(
        manifest=manifest,
        tensors=sum(len(file.tensors) for file in manifest.files),
        nbytes=sum(file.nbytes for file in manifest.files),
        compared_with_source=against is not None,
        problems=tuple(problems),
    )


def check_tensor_parallel_size(manifest: Manifest, asked: int | None, where: str) -> int:
    """The size that the files were cut for.

    Raises:
        VerificationError: another one was asked for: engines would load it and talk nonsense.
    """
    size = manifest.tensor_parallel_size
    if asked is not None and asked != size:
        raise VerificationError(
            f"{where} was sharded for tensor parallel size {size}, not {asked}",
            hint=f"use --tensor-parallel-size {size}, or shard the model again for {asked}",
        )
    return size


def _structure(directory: Path, config: dict[str, object], manifest: Manifest) -> Iterator[str]:
    """Does the manifest describe what this layout demands of this config?"""
    listed = {file.name for file in manifest.files}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in listed:
            yield f"{path.name} is not in the manifest; engines would load it as well"
    try:
        spec = model_spec(config)
        layout = stored_layout(manifest.layout)
        parallel = Parallel(
            tensor_parallel_size=manifest.tensor_parallel_size,
            pipeline_parallel_size=manifest.pipeline_parallel_size,
            uneven=layout.uneven,
        )
        for rank in parallel.ranks():
            expected = {t.name: t for t in rank_tensors(spec, rank, layout)}
            files = manifest.rank_files(rank.rank)
            stored = {t.name: t for file in files for t in file.tensors}
            for name in sorted(expected.keys() - stored.keys()):
                yield f"rank {rank.rank} lacks {name!r}"
            for name in sorted(stored.keys() - expected.keys()):
                yield f"rank {rank.rank} has {name!r}, which layout {layout.name} does not want"
            for name in sorted(expected.keys() & stored.keys()):
                wanted, found = expected[name], stored[name]
                if wanted.shape != found.shape:
                    yield (
                        f"rank {rank.rank}: {name!r} has the shape {list(found.shape)}, and "
                        f"config.json says {list(wanted.shape)}"
                    )
                elif (wanted.pieces, wanted.fill) != (found.pieces, found.fill):
                    yield f"rank {rank.rank}: {name!r} holds the slices of another rank or model"
    except TightfitError as error:
        yield f"config.json does not fit the manifest: {error.message}"


def _file_structure(directory: Path, file: StoredFile) -> Iterator[str]:
    """Is the file there, and does its header agree with the manifest?"""
    try:
        path = directory / safe_name(file.name, "the manifest")
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            header = read_header(
                file.name, size, lambda start, stop: os.pread(stream.fileno(), stop - start, start)
            )
    except FileNotFoundError:
        yield f"{file.name} is missing"
        return
    except OSError as error:
        yield f"{file.name} cannot be read: {error.strerror}"
        return
    except CheckpointError as error:
        yield error.message
        return
    expected = {
        t.name: TensorInfo(
            name=t.name,
            dtype=t.dtype,
            shape=t.shape,
            file=file.name,
            offset=t.offset,
            nbytes=t.nbytes,
        )
        for t in file.tensors
    }
    for name in sorted(header.keys() | expected.keys()):
        if header.get(name) != expected.get(name):
            yield f"{file.name}: the header and the manifest disagree about {name!r}"


def _content(directory: Path, file: StoredFile, progress: Progress) -> Iterator[str]:
    with open(directory / file.name, "rb") as stream:
        for tensor in file.tensors:
            found = checksum(stream.fileno(), tensor.offset, tensor.nbytes, progress.advance)
            if found != tensor.xxh3:
                yield f"{file.name}: {tensor.name!r} is damaged (its checksum differs)"


def _against(
    directory: Path, files: list[StoredFile], source: Checkpoint, progress: Progress
) -> Iterator[str]:
    """Compare every tensor with the source: pieces byte by byte, the rest with its fill."""
    tensors = source.tensors()
    with SourceFiles(source.source) as source_files, ExitStack() as stack:
        for file in files:
            stream = stack.enter_context(open(directory / file.name, "rb"))
            for tensor in file.tensors:
                missing = [p.source for p in tensor.pieces if p.source not in tensors]
                if missing:
                    yield f"{source.name} lacks {missing[0]!r}, from which {tensor.name!r} was made"
                elif not _equal(stream.fileno(), tensor, tensors, source_files):
                    yield f"{file.name}: {tensor.name!r} differs from {source.name}"
                progress.advance(tensor.nbytes)


def _equal(
    fd: int, tensor: StoredTensor, sources: dict[str, TensorInfo], files: SourceFiles
) -> bool:
    """Rebuild the tensor in chunks of rows, and compare."""
    size = dtype_bytes(tensor.dtype)
    row_bytes = (tensor.shape[-1] if len(tensor.shape) > 1 else 1) * size
    rows = tensor.nbytes // row_bytes if row_bytes else 0
    block = max(1, BUFFER_BYTES // max(row_bytes, 1))
    fill = struct.pack("<f", tensor.fill) if tensor.fill else bytes(row_bytes)
    for first in range(0, rows, block):
        last = min(first + block, rows)
        expected = bytearray(fill * (last - first))
        for at, source, start, shape in _runs(tensor):
            info = sources[source]
            if info.dtype != tensor.dtype or len(info.shape) != len(shape):
                return False
            low, high = max(at, first), min(at + shape[0], last)
            if low < high:
                begin = (start[0] + low - at, *start[1:])
                box = _read_box(info, begin, (high - low, *shape[1:]), files)
                expected[(low - first) * row_bytes : (high - first) * row_bytes] = box
        if os.pread(fd, len(expected), tensor.offset + first * row_bytes) != expected:
            return False
    return True


def _runs(
    tensor: StoredTensor,
) -> Iterator[tuple[int, str, tuple[int, ...], tuple[int, ...]]]:
    """(first row in the tensor seen as rows, source, start, shape) of each piece."""
    matrix = len(tensor.shape) > 1
    for piece in tensor.pieces:
        rows = piece.at[:-1] if matrix else piece.at
        at = 0
        for position, extent in zip(rows, tensor.shape, strict=False):
            at = at * extent + position
        yield at, piece.source, piece.start, piece.shape


def _read_box(
    info: TensorInfo, start: tuple[int, ...], shape: tuple[int, ...], files: SourceFiles
) -> bytes:
    """The bytes of a box of a source tensor; empty if the tensor is too small for it."""
    size = dtype_bytes(info.dtype)
    stride = prod(info.shape[1:]) * size
    column = start[1] * size if len(start) > 1 else 0
    width = prod(shape[1:]) * size
    if any(s + n > extent for s, n, extent in zip(start, shape, info.shape, strict=True)):
        return b""
    begin = info.offset + start[0] * stride
    data = files.read(info.file, begin, begin + shape[0] * stride)
    if width == stride:
        return data
    return b"".join(data[at : at + width] for at in range(column, len(data), stride))
