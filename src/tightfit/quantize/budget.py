"""`--budget`: the mixed recipe of a given size with the least error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.model.quantization.written import Choice, Wish
from tightfit.sharding.progress import Progress

CANDIDATES: tuple[Choice, ...] = (
    Choice(scheme="fp8-channel"),
    Choice(scheme="w4a16", group_size=128),
    Choice(scheme="w4a16", group_size=64),
    Choice(scheme="w4a16", group_size=32),
)
"""Schemes that are tried for every group, beside leaving it as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What became of matrices that engines hold as one; None leaves them alone."""

    name: str
    modules: tuple[str, ...]
    choice: Choice | None
    total_bytes: int
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe that fits: `wish` for `prepare`, and what it comes to.

    `total_bytes` are those of all tensors of the checkpoint, `smallest_bytes` the least that is
    possible with the candidates. `error` is the root of the squared errors of all matrices over
    their squared norms.
    """

    wish: Wish
    budget_bytes: int
    total_bytes: int
    smallest_bytes: int
    error: float
    decisions: tuple[Decision, ...]

    def to_json(self) -> dict[str, Any]:
        """Schema 1: `{"schema", "budget_bytes", "total_bytes", "smallest_bytes", "error",
        "decisions"}`."""
        raise NotImplementedError


def fit_budget(
    checkpoint: Checkpoint,
    budget_bytes: int,
    *,
    candidates: Sequence[Choice] = CANDIDATES,
    ignored: Sequence[str] = (),
    tensor_parallel_size: int = 1,
    search: bool = False,
    weights: Mapping[int, float] | None = None,
    progress: Progress | None = None,
) -> Recipe:
    """Choose schemes so that the tensors of the checkpoint take at most so many bytes.

    Reads every matrix once, for the errors of all candidates.

    Args:
        checkpoint: an unquantized one.
        budget_bytes: for the tensors, also those that stay as they are.
        candidates: schemes of one format.
        ignored: patterns of modules that stay as they are.
        tensor_parallel_size: at which every scheme has to divide what it gets.
        search: look for scales with the least error, as `--method mse` does.
        weights: how much the errors of each layer count, as `Sensitivity.weights()` has it.
        progress: told of the source bytes.

    Raises:
        UsageError: the budget is smaller than the smallest possible size, which the message gives.
        CheckpointError: weights that are missing, truncated or not finite.
        UnsupportedModelError: the architecture is not known, or quantized already.
    """
    raise NotImplementedError
