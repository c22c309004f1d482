"""How near a quantized checkpoint is to its original: the error of every matrix.

Both sides are read some rows at a time, the quantized one as it is stored and decoded again, so
that the figures are those of the files, whatever method made them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.quantize.job import QuantizeJob
from tightfit.sharding.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixQuality:
    """The error of one matrix `W` that became `Q`.

    `squared_error` is ||W-Q||^2 and `squared_norm` ||W||^2 (Frobenius). `worst` are the outputs
    with the largest relative errors, worst first. `scales` counts the scales by the floor of their
    base-2 logarithm. `clipped` counts weights beyond the grid by more than half its last step.
    """

    module: str
    kind: str
    layer: int | None
    scheme: str
    parameters: int
    squared_error: float
    squared_norm: float
    largest_error: float
    worst: tuple[tuple[int, float], ...]
    scales: Mapping[int, int]
    clipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The errors of all matrices of a checkpoint, in the order of the model."""

    model: str
    scheme: str
    method: str
    matrices: tuple[MatrixQuality, ...]

    def to_json(self) -> dict[str, Any]:
        """Schema 1: `{"schema", "model", "scheme", "method", "total", "kinds", "layers", "matrices"}`.

        Each of them has `relative_error`, `sqnr_db` (None without an error), `largest_error` and
        `clipped_share`.
        """
        raise NotImplementedError


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
    raise NotImplementedError
