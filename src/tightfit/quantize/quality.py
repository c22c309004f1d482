"""How near a quantized checkpoint is to its original: the error of every matrix.

Both sides are read some rows at a time, the quantized one as it is stored and decoded again, so
that the figures are those of the files, whatever method made them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.header import TensorInfo
from tightfit.codecs import Codec, Scales, codec
from tightfit.codecs.floats import Fp8Tensor
from tightfit.errors import CheckpointError
from tightfit.quantize.decoding import reach, read_stored, some_rows
from tightfit.quantize.encoding import check_finite, rows_of
from tightfit.quantize.job import QuantizeJob
from tightfit.quantize.matrices import Matrix
from tightfit.quantize.places import KINDS, Where, places
from tightfit.runtime.loading.files import TORCH_DTYPES
from tightfit.sharding.progress import Progress
from tightfit.units import dtype_bytes

_WORST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Errors of one or several matrices `W` that became `Q`.

    `squared_error` is ||W-Q||^2 and `squared_norm` ||W||^2 (Frobenius), `clipped` how many weights
    are beyond the last value of their grid by more than half of its last step.
    """

    parameters: int
    squared_error: float
    squared_norm: float
    largest_error: float
    clipped: int

    @staticmethod
    def of_all(some: Iterable["Figures"]) -> "Figures":
        """Of several as if they were one matrix."""
        found = tuple(some)
        return Figures(
            parameters=sum(one.parameters for one in found),
            squared_error=math.fsum(one.squared_error for one in found),
            squared_norm=math.fsum(one.squared_norm for one in found),
            largest_error=max((one.largest_error for one in found), default=0.0),
            clipped=sum(one.clipped for one in found),
        )

    @property
    def relative_error(self) -> float:
        """||W-Q|| / ||W||; 0 where both are 0."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_error else 0.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in decibels; None where there is no noise."""
        if not self.squared_error:
            return None
        return 10 * math.log10(self.squared_norm / self.squared_error)

    @property
    def clipped_share(self) -> float:
        """Of all weights."""
        return self.clipped / self.parameters if self.parameters else 0.0

    def to_json(self) -> dict[str, Any]:
        """`relative_error`, `sqnr_db`, `largest_error`, `clipped_share` and `parameters`."""
        return {
            "relative_error": self.relative_error,
            "sqnr_db": self.sqnr_db,
            "largest_error": self.largest_error,
            "clipped_share": self.clipped_share,
            "parameters": self.parameters,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixQuality:
    """The error of one matrix.

    `worst` are the outputs with the largest relative errors, worst first. `scales` counts the
    scales by the floor of their base-2 logarithm.
    """

    module: str
    where: Where
    scheme: str
    figures: Figures
    worst: tuple[tuple[int, float], ...]
    scales: Mapping[int, int]

    def to_json(self) -> dict[str, Any]:
        """With `module`, `kind`, `layer`, `scheme`, `worst_outputs` and `scales_log2`."""
        return {
            "module": self.module,
            "kind": self.where.kind,
            "layer": self.where.layer,
            "scheme": self.scheme,
            **self.figures.to_json(),
            "worst_outputs": [list(one) for one in self.worst],
            "scales_log2": _bins(self.scales),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The errors of all matrices of a checkpoint, in the order of the model."""

    model: str
    scheme: str
    method: str
    matrices: tuple[MatrixQuality, ...]

    @property
    def caveat(self) -> str | None:
        """Why the figures are not what they seem."""
        if self.method not in ("awq", "smoothquant"):
            return None
        return (
            f"{self.method} moves scales of inputs into the weights, so that these figures are "
            "differences from the original weights, and no errors; judge by --evaluate or "
            "--sensitivity"
        )

    @property
    def total(self) -> Figures:
        """Of all that is quantized."""
        return Figures.of_all(one.figures for one in self.matrices)

    @property
    def kinds(self) -> dict[str, Figures]:
        """By kind of module, in the order of `KINDS`."""
        found: dict[str, list[Figures]] = {kind: [] for kind in KINDS}
        for one in self.matrices:
            found[one.where.kind].append(one.figures)
        return {kind: Figures.of_all(some) for kind, some in found.items() if some}

    @property
    def layers(self) -> dict[int, Figures]:
        """By decoder layer."""
        found: dict[int, list[Figures]] = {}
        for one in self.matrices:
            if one.where.layer is not None:
                found.setdefault(one.where.layer, []).append(one.figures)
        return {layer: Figures.of_all(found[layer]) for layer in sorted(found)}

    def worst(self, count: int) -> tuple[MatrixQuality, ...]:
        """The matrices with the largest relative errors, worst first."""
        ranked = sorted(self.matrices, key=lambda one: -one.figures.relative_error)
        return tuple(ranked[:count])

    def to_json(self) -> dict[str, Any]:
        """Schema 1: `total`, `kinds`, `layers` and `matrices`, each as of `Figures.to_json`."""
        scales: Counter[int] = Counter()
        for one in self.matrices:
            scales.update(one.scales)
        return {
            "schema": 1,
            "model": self.model,
            "scheme": self.scheme,
            "method": self.method,
            "caveat": self.caveat,
            "total": {**self.total.to_json(), "scales_log2": _bins(scales)},
            "kinds": [{"kind": kind, **one.to_json()} for kind, one in self.kinds.items()],
            "layers": [{"layer": layer, **one.to_json()} for layer, one in self.layers.items()],
            "matrices": [one.to_json() for one in self.matrices],
        }


def measure(
    job: QuantizeJob, written: Checkpoint | None = None, *, progress: Progress | None = None
) -> Quality:
    """Compare a quantized checkpoint with its original, in memory for one matrix at a time.

    Args:
        job: from `prepare`.
        written: the checkpoint that was written (`open_checkpoint(out)`), of any method; without
            it the matrices are encoded for this.
        progress: told of the bytes of the original.

    Raises:
        CheckpointError: a file is truncated or lacks a tensor, or values are not finite.
    """
    quantized = written or job.virtual
    infos, where = quantized.tensors(), places(job.spec)
    if progress is not None:
        progress.phase("measuring", sum(map(_nbytes, job.matrices)))
    found = []
    for matrix in job.matrices:
        tensors = {kind: _info(one.name, infos, quantized) for kind, one in matrix.outputs.items()}
        found.append(_compared(matrix, where[matrix.module], job.checkpoint, tensors, quantized))
        if progress is not None:
            progress.advance(_nbytes(matrix))
    return Quality(
        model=job.checkpoint.name,
        scheme=job.wish.label,
        method=job.method,
        matrices=tuple(found),
    )


def _compared(
    matrix: Matrix,
    where: Where,
    original: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    quantized: Checkpoint,
) -> MatrixQuality:
    coder = codec(matrix.choice, TORCH_DTYPES[matrix.source.dtype])
    stored = read_stored(tensors, quantized.source)
    errors = torch.zeros(matrix.rows, dtype=torch.float64)
    norms = torch.zeros_like(errors)
    largest, clipped, first = 0.0, 0, 0
    scales: Counter[int] = Counter()
    for rows in rows_of(matrix, original.source, coder.row_step):
        check_finite(rows, matrix)
        count = len(rows)
        codes, span = coder.unpack(some_rows(coder, stored, matrix.rows, first, count))
        clipped += _clipped(coder, rows, codes, span)
        difference = coder.values(codes, span).sub_(rows)
        here = slice(first, first + count)
        errors[here] = difference.square().sum(dim=1, dtype=torch.float64)
        norms[here] = rows.square().sum(dim=1, dtype=torch.float64)
        largest = max(largest, float(difference.abs_().amax()))
        if not first or not isinstance(coder, Fp8Tensor):
            scales += _exponents(span.factor)
        first += count
    relative = torch.where(errors > 0, errors / norms, 0.0).sqrt_()
    worst = relative.topk(min(_WORST, matrix.rows))
    return MatrixQuality(
        module=matrix.module,
        where=where,
        scheme=matrix.choice.label,
        figures=Figures(
            parameters=matrix.rows * matrix.columns,
            squared_error=float(errors.sum()),
            squared_norm=float(norms.sum()),
            largest_error=largest,
            clipped=clipped,
        ),
        worst=tuple(zip(worst.indices.tolist(), worst.values.tolist(), strict=True)),
        scales=scales,
    )


def _clipped(coder: Codec, rows: Tensor, codes: Tensor, scales: Scales) -> int:
    low, high = (coder.values(torch.full_like(codes, end), scales) for end in reach(coder))
    return int(((rows < low) | (rows > high)).sum())


def _exponents(factor: Tensor) -> Counter[int]:
    """How many scales are at least a power of two and less than the next, by its exponent."""
    exponents = torch.frexp(factor)[1].flatten() - 1 + _LOWEST
    counts = torch.bincount(exponents)
    return Counter({int(at) - _LOWEST: int(counts[at]) for at in counts.nonzero()})


_LOWEST = 150
"""No float32 has a lower exponent than its negative."""


def _info(name: str, infos: Mapping[str, TensorInfo], where: Checkpoint) -> TensorInfo:
    if name not in infos:
        raise CheckpointError(
            f"{where.name} lacks the tensor {name!r}",
            hint="it was made from another model, or with another recipe",
        )
    return infos[name]


def _nbytes(matrix: Matrix) -> int:
    return dtype_bytes(matrix.source.dtype, matrix.rows * matrix.columns)


def _bins(scales: Mapping[int, int]) -> dict[str, int]:
    return {str(exponent): scales[exponent] for exponent in sorted(scales)}
