"""`--budget`: the mixed recipe of a given size with the least error.

Matrices that engines hold as one get one scheme, and so do all experts of a layer. For each such
group the error of every scheme is measured, all in one pass over the weights. Of the sizes and
errors of a group only the lower convex hull is worth its bytes; starting with the smallest of all,
the group whose next step saves the most error for its bytes takes it, as long as there is room
(Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers"). What then
is left over goes to whatever single change saves the most.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.errors import UsageError
from tightfit.model.layout import Parallel
from tightfit.model.parameters import check_parallel
from tightfit.model.quantization.written import Choice, Wish
from tightfit.model.spec import ModelSpec
from tightfit.quantize.calibration.options import CalibrationOptions
from tightfit.quantize.candidates import Group, Option, SizedGroup, measured, sized_groups
from tightfit.quantize.job import prepare, unquantized_spec
from tightfit.quantize.observe import Observed, observe
from tightfit.quantize.places import Where
from tightfit.sharding.progress import Progress
from tightfit.units import format_bytes

CANDIDATES: tuple[Choice, ...] = (
    Choice(scheme="fp8-channel"),
    Choice(scheme="w4a16", group_size=128),
    Choice(scheme="w4a16", group_size=64),
    Choice(scheme="w4a16", group_size=32),
)
"""Schemes that are tried for every group, beside leaving it as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedRecipe:
    """A recipe that fits: `wish` for `prepare`, and what it comes to.

    `total_bytes` are those of all tensors of the checkpoint, `smallest_bytes` the least that is
    possible with the candidates. `decisions` has the choice for each group.
    """

    wish: Wish
    budget_bytes: int
    total_bytes: int
    smallest_bytes: int
    decisions: tuple[tuple[Group, Option], ...]

    @property
    def relative_error(self) -> float:
        """||W-Q|| / ||W|| of all matrices that could have been quantized."""
        error = math.fsum(option.squared_error for _, option in self.decisions)
        norm = math.fsum(group.squared_norm for group, _ in self.decisions)
        return math.sqrt(error / norm) if error else 0.0

    def to_json(self) -> dict[str, Any]:
        """Schema 1: sizes, `relative_error`, and `groups` with their `scheme` and `modules`."""
        return {
            "schema": 1,
            "budget_bytes": self.budget_bytes,
            "total_bytes": self.total_bytes,
            "smallest_bytes": self.smallest_bytes,
            "relative_error": self.relative_error,
            "groups": [
                {
                    "name": group.name,
                    "kind": group.where.kind,
                    "layer": group.where.layer,
                    "modules": list(group.modules),
                    "scheme": option.label,
                    "total_bytes": option.total_bytes,
                    "relative_error": math.sqrt(option.squared_error / (group.squared_norm or 1)),
                }
                for group, option in self.decisions
            ],
        }


def fit_budget(
    checkpoint: Checkpoint,
    budget_bytes: int,
    *,
    candidates: Sequence[Choice] = CANDIDATES,
    ignored: Sequence[str] = (),
    tensor_parallel_size: int = 1,
    search: bool = False,
    calibration: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> FittedRecipe:
    """Choose schemes so that the tensors of the checkpoint take at most so many bytes.

    Reads every matrix once, for the errors of all candidates.

    Args:
        checkpoint: an unquantized one.
        budget_bytes: for the tensors, also those that stay as they are.
        candidates: schemes of one format.
        ignored: patterns of modules that stay as they are.
        tensor_parallel_size: at which every scheme has to divide what it gets.
        search: look for scales with the least error, as `--method mse` does.
        calibration: text that shows how much what the attention and the MLP of each layer give
            out suffers; without it all weights count alike.
        progress: told of the source bytes.

    Raises:
        UsageError: the budget is smaller than the smallest possible size, which the message gives;
            or the candidates have several formats.
        LayoutError: the model cannot be cut for so many ranks.
        CheckpointError: weights that are missing, truncated or not finite.
        UnsupportedModelError: the architecture is not known, or quantized already; or there is
            text, and the built-in runtime cannot run the model.
    """
    spec = unquantized_spec(checkpoint)
    parallel = Parallel(tensor_parallel_size=tensor_parallel_size)
    check_parallel(spec, parallel)
    left_alone = tuple((pattern, None) for pattern in ignored)
    # Refuses several formats before anything is measured.
    _ = Wish(default=None, rules=tuple(("", choice) for choice in candidates)).format
    wishes = [Wish(default=choice, rules=left_alone) for choice in candidates]
    total = sum(info.nbytes for info in checkpoint.tensors().values())
    if total <= budget_bytes:
        raise UsageError(
            f"{checkpoint.name} takes {format_bytes(total)} as it is, which is within the budget",
            hint="serve it unquantized, or give a smaller budget",
        )
    sized = sized_groups(checkpoint, spec, wishes, parallel)
    kept_bytes = total - sum(group.held_bytes for group in sized)
    smallest = kept_bytes + sum(group.total_bytes(group.smallest) for group in sized)
    if smallest > budget_bytes:
        raise UsageError(
            f"{checkpoint.name} takes at least {format_bytes(smallest)} ({smallest:,} bytes) with "
            f"{', '.join(choice.label for choice in candidates)}, and the budget is "
            f"{format_bytes(budget_bytes)}",
            hint=f"{format_bytes(kept_bytes)} of that stay as they are, such as embeddings; "
            "give a larger budget, or smaller schemes",
        )
    observed = (
        None if calibration is None else _observed(checkpoint, spec, sized, calibration, progress)
    )
    groups = []
    if progress is not None:
        progress.phase("measuring", total - kept_bytes)
    for group in sized:
        groups.append(measured(group, checkpoint.source, search=search))
        if progress is not None:
            progress.advance(group.held_bytes)
    weights = _weights(groups, {} if observed is None else observed.places)
    chosen = allocate(groups, budget_bytes - kept_bytes, weights)
    choices = [(group, option.choice) for group, option in zip(groups, chosen, strict=True)]
    return FittedRecipe(
        wish=Wish(default=None, rules=tuple(_rules(spec, choices))),
        budget_bytes=budget_bytes,
        total_bytes=kept_bytes + sum(option.total_bytes for option in chosen),
        smallest_bytes=smallest,
        decisions=tuple(zip(groups, chosen, strict=True)),
    )


def allocate(groups: Sequence[Group], room: int, weights: Sequence[float]) -> list[Option]:
    """For each group the option to take, with little damage in all; the smallest ones must fit.

    Args:
        groups: with their options.
        room: bytes for all of them.
        weights: of the damage of each group.
    """
    steps = []
    for number, (group, weight) in enumerate(zip(groups, weights, strict=True)):
        hull = _hull(group.options)
        for at, (one, other) in enumerate(pairwise(hull)):
            saved = weight * (one.damage - other.damage)
            steps.append((-saved / (other.total_bytes - one.total_bytes), number, at, other))
    chosen = [_hull(group.options)[0] for group in groups]
    left = room - sum(option.total_bytes for option in chosen)
    stopped: set[int] = set()
    for _, number, _, option in sorted(steps, key=lambda step: step[:3]):
        more = option.total_bytes - chosen[number].total_bytes
        if number in stopped or more > left:
            stopped.add(number)
            continue
        chosen[number] = option
        left -= more
    while (best := _best_change(groups, chosen, left, weights)) is not None:
        number, option = best
        left -= option.total_bytes - chosen[number].total_bytes
        chosen[number] = option
    return chosen


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of sizes and damages, from the smallest size to the least damage."""
    found: list[Option] = []
    for one in sorted(options, key=lambda option: (option.total_bytes, option.damage)):
        if found and one.damage >= found[-1].damage:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) >= _slope(found[-2], one):
            found.pop()
        found.append(one)
    return found


def _slope(one: Option, other: Option) -> float:
    return (other.damage - one.damage) / (other.total_bytes - one.total_bytes)


def _best_change(
    groups: Sequence[Group], chosen: Sequence[Option], left: int, weights: Sequence[float]
) -> tuple[int, Option] | None:
    """The change of one group that fits and saves the most damage."""
    best, most = None, 0.0
    for number, (group, now) in enumerate(zip(groups, chosen, strict=True)):
        for option in group.options:
            saved = weights[number] * (now.damage - option.damage)
            if option.total_bytes - now.total_bytes <= left and saved > most:
                best, most = (number, option), saved
    return best


def _observed(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    sized: Sequence[SizedGroup],
    calibration: CalibrationOptions,
    progress: Progress | None,
) -> Observed:
    """What the smallest recipe of all does to each layer."""
    smallest = ((group, group.smallest) for group in sized)
    wish = Wish(default=None, rules=tuple(_rules(spec, smallest)))
    with TemporaryDirectory(prefix="tightfit-") as directory:
        return observe(prepare(checkpoint, wish), calibration, Path(directory), progress=progress)


def _weights(groups: Sequence[Group], places: Mapping[Where, float]) -> list[float]:
    """How much the damage of each group counts.

    In a place that was observed as what was observed is to its sum there, both with the smallest
    options; elsewhere as it is.
    """
    sums: dict[Where, float] = {}
    for group in groups:
        sums[group.where] = sums.get(group.where, 0.0) + group.options[0].damage
    found = {where: places[where] / one for where, one in sums.items() if one and where in places}
    return [found.get(group.where, 1.0) for group in groups]


def _rules(
    spec: ModelSpec, chosen: Iterable[tuple[Group | SizedGroup, Choice | None]]
) -> Iterator[tuple[str, Choice | None]]:
    """Patterns that match these modules and no others, with the layers that are alike in one."""
    layers: dict[tuple[Choice, tuple[str, ...]], list[int]] = {}
    for group, choice in chosen:
        if choice is None:
            continue
        prefix = f"{spec.names.layers}.{group.where.layer}."
        if all(module.startswith(prefix) for module in group.modules):
            ends = tuple(module.removeprefix(prefix) for module in group.modules)
            layers.setdefault((choice, ends), []).append(group.where.layer or 0)
        else:
            yield f"^{_either(map(re.escape, group.modules))}$", choice
    for (choice, ends), numbers in layers.items():
        start = re.escape(f"{spec.names.layers}.")
        yield f"^{start}{_either(map(str, numbers))}\\.{_either(map(re.escape, ends))}$", choice


def _either(patterns: Iterable[str]) -> str:
    found = list(patterns)
    return found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"
