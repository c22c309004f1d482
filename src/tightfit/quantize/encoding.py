"""A checkpoint, quantized while it is read."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from threading import Lock

import torch
from torch import Tensor

from tightfit.checkpoint.header import TensorInfo
from tightfit.checkpoint.source import Source
from tightfit.codecs import codec
from tightfit.errors import CheckpointError
from tightfit.quantize.computed_source import ComputedSource, Kept, Made, read_exactly
from tightfit.quantize.matrices import Matrix
from tightfit.runtime.loading.files import TORCH_DTYPES
from tightfit.units import dtype_bytes

_CHUNK_ELEMENTS = 2**20
"""Rows that are encoded at a time: what a processor's cache holds, a few times over."""


class EncodedSource(ComputedSource[Matrix]):
    """Matrices of `base`, encoded; `search` is for scales with the least squared error."""

    def __init__(
        self, base: Source, kept: Iterable[Kept], matrices: Sequence[Matrix], *, search: bool
    ) -> None:
        self._search, self._largest = search, _Largest()
        self._together: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            self._together.setdefault(matrix.fused, []).append(matrix)
        made = [Made(unit=matrix, outputs=matrix.outputs) for matrix in matrices]
        super().__init__(base, kept, made)

    def make(self, unit: Matrix) -> Mapping[str, Tensor]:
        """Encode a matrix.

        Raises:
            CheckpointError: it has values that are not finite, or its file ends early.
        """
        coder = codec(unit.choice, TORCH_DTYPES[unit.source.dtype])
        amax = self._largest.get(unit.fused, self._largest_of) if coder.needs_amax else None
        # What is large goes to its place at once, as joining pieces takes their memory twice.
        large = max(unit.outputs, key=lambda kind: prod(unit.outputs[kind].shape))
        whole: Tensor | None = None
        pieces, at = [], 0
        for rows in rows_of(unit, self.base, coder.row_step):
            check_finite(rows, unit)
            piece = coder.encode(rows, amax, search=self._search)
            pieces.append(piece)
            values = piece.pop(large)
            if whole is None:
                whole = torch.empty(unit.outputs[large].shape, dtype=values.dtype)
            along = next((i for i in (0, 1) if values.shape[i] != whole.shape[i]), 0)
            whole.narrow(along, at, values.shape[along]).copy_(values)
            at += values.shape[along]
        assert whole is not None
        return {**coder.joined(pieces), large: whole}

    def inputs(self, unit: Matrix) -> Iterable[TensorInfo]:
        """The tensor that it is in."""
        return (unit.source,)

    def _largest_of(self, fused: str) -> Tensor:
        largest = torch.zeros(())
        for matrix in self._together[fused]:
            for rows in rows_of(matrix, self.base, 1):
                check_finite(rows, matrix)
                largest = torch.maximum(largest, rows.abs_().amax())
        return largest


class _Largest:
    """The largest absolute value of all that an engine holds as one, by the name of that.

    Several threads ask for it, and the first one finds it. A pickled one knows of none.
    """

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}
        self._locks: dict[str, Lock] = {}

    def __reduce__(self) -> tuple[type["_Largest"], tuple[()]]:
        return _Largest, ()

    def get(self, fused: str, find: Callable[[str], Tensor]) -> Tensor:
        with self._locks.setdefault(fused, Lock()):
            if fused not in self._found:
                self._found[fused] = find(fused)
        return self._found[fused]


def rows_of(matrix: Matrix, source: Source, step: int) -> Iterator[Tensor]:
    """A matrix, some rows at a time (a multiple of `step`), float32 `[rows, columns]`.

    Raises:
        CheckpointError: its file ends early.
    """
    info = matrix.source
    dtype, size = TORCH_DTYPES[info.dtype], dtype_bytes(info.dtype)

    def read(first: int, count: int) -> Tensor:
        start = info.offset + first * size
        data = bytearray(read_exactly(source, info.file, start, start + count * size))
        return torch.frombuffer(data, dtype=dtype)

    if matrix.transposed:
        # Its rows are columns, and there is no reading some of them.
        length = (matrix.columns - 1) * matrix.pitch + matrix.rows
        lines = read(matrix.first, length)
        whole = lines.as_strided((matrix.columns, matrix.rows), (matrix.pitch, 1)).T
    count = max(_CHUNK_ELEMENTS // (matrix.columns * step), 1) * step
    for row in range(0, matrix.rows, count):
        some = min(count, matrix.rows - row)
        if matrix.transposed:
            yield whole[row : row + some].float().contiguous()
        else:
            flat = read(matrix.first + row * matrix.pitch, some * matrix.columns)
            rows = flat.view(some, matrix.columns)
            yield rows.float() if dtype is not torch.float32 else rows


def check_finite(rows: Tensor, matrix: Matrix) -> None:
    """Refuse values that no scale can hold.

    Raises:
        CheckpointError: some are not finite.
    """
    # A sum is quicker to check, and finite unless there are such values, or huge ones.
    if not torch.isfinite(rows.sum()) and not torch.isfinite(rows).all():
        kind = "NaN" if torch.isnan(rows).any() else "infinity"
        raise CheckpointError(
            f"{matrix.source.name!r} in {matrix.source.file} holds {kind}, which cannot be "
            "quantized",
            hint=f"the checkpoint is damaged; or leave the layer alone: --ignore '{matrix.module}'",
        )
