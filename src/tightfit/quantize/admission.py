"""Which matrices a scheme cannot hold, whole or cut for several ranks: known before any is read.

Groups and blocks of scales have to divide the inputs of a matrix, and the share of each rank where
an engine cuts along them; blocks have to divide what engines fuse; words have to be full.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from tightfit.errors import LayoutError, TightfitError
from tightfit.model.layout import Cut, Parallel, Rank, Weight
from tightfit.model.parameters import check_parallel, plain_parameters
from tightfit.model.quantization.leaving import ignoring, short_names
from tightfit.model.quantization.recipe import Recipe, split_experts
from tightfit.model.quantization.written import (
    COMPRESSED_TENSORS,
    GROUPED,
    Choice,
    Decisions,
    Wish,
    held_together,
    matrices,
    module_name,
    written,
)
from tightfit.model.spec import ModelSpec

COMMON_SIZES = (2, 4, 8)
"""Tensor parallel sizes that most people use."""
_SMALLER_GROUPS = (64, 32)
_WITHOUT_GROUPS = ("fp8-channel", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Matrices that cannot be quantized as asked, why, and what would do instead."""

    modules: tuple[str, ...]
    """Names, with `*` for numbers that do not matter."""
    matrices: int
    scheme: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{', '.join(self.modules)}: {self.reason}"


class RefusedError(LayoutError):
    """Some matrices cannot be quantized as asked; `refusals` are all of them.

    `remedy` is what would do for all at once.
    """

    def __init__(self, refusals: tuple[Refusal, ...], remedy: str) -> None:
        first, *others = refusals
        more = f" (and {len(others)} more, see --dry-run)" if others else ""
        super().__init__(f"{first}{more}", hint=remedy)
        self.refusals, self.remedy = refusals, remedy


def admit(
    spec: ModelSpec, wish: Wish, decisions: Decisions, *, tensor_parallel_size: int = 1
) -> None:
    """Refuse what could not be written, or not be loaded on so many ranks.

    Args:
        spec: the model, unquantized.
        wish: what the user wants.
        decisions: what becomes of each matrix.
        tensor_parallel_size: ranks that have to be able to load it.

    Raises:
        RefusedError: groups, blocks or words do not divide matrices, or what a rank holds of them.
        LayoutError: the model itself cannot be cut for so many ranks.
    """
    parallel = Parallel(tensor_parallel_size=tensor_parallel_size)
    check_parallel(spec, parallel)
    refused = _refused(spec, wish, decisions, parallel)
    if not refused:
        return

    def remedy(weights: Collection[Weight]) -> str:
        return _remedy(spec, wish, decisions, weights, parallel)

    refusals = (
        _refusal(choice, reason, weights, remedy(weights))
        for (choice, reason), weights in refused.items()
    )
    raise RefusedError(tuple(refusals), remedy([one for some in refused.values() for one in some]))


def lost_sizes(spec: ModelSpec, wish: Wish, decisions: Decisions) -> dict[int, RefusedError]:
    """Common tensor parallel sizes that the model allows, and its quantized form does not."""
    found = {}
    for size in COMMON_SIZES:
        try:
            admit(spec, wish, decisions, tensor_parallel_size=size)
        except RefusedError as error:
            found[size] = error
        except LayoutError:
            continue
    return found


def _refused(
    spec: ModelSpec, wish: Wish, decisions: Decisions, parallel: Parallel
) -> dict[tuple[Choice, str], list[Weight]]:
    """Weights that cannot be stored or held, by what was asked for and why not."""
    fitted = written(spec, wish).fitted(plain_parameters(spec), parallel)
    found: dict[tuple[Choice, str], list[Weight]] = {}
    for weight in matrices(spec):
        choice = decisions[_modules(weight)[0]]
        if choice is not None and (reason := problem(weight, fitted, parallel)):
            found.setdefault((choice, reason), []).append(weight)
    return found


def _refusal(choice: Choice, reason: str, weights: Collection[Weight], remedy: str) -> Refusal:
    return Refusal(
        modules=short_names(module for weight in weights for module in _modules(weight)),
        matrices=sum(len(w.parts) * max(w.experts, 1) for w in weights),
        scheme=choice.label,
        reason=reason,
        remedy=remedy,
    )


def _modules(weight: Weight) -> tuple[str, ...]:
    return tuple(module_name(part.source) for part in split_experts(weight).parts)


def problem(weight: Weight, recipe: Recipe, parallel: Parallel) -> str | None:
    """Why a weight cannot be stored, or held by a rank; None if it can."""
    try:
        list(recipe.apply(weight))
        rank = Rank(parallel=parallel)
        for _, tensor in recipe.created(weight):
            if parallel.tensor_parallel_size > 1:
                _check_cut(tensor, rank)
    except TightfitError as error:
        return error.message
    return None


def _check_cut(tensor: Weight, rank: Rank) -> None:
    rank = rank.for_experts() if tensor.experts else rank
    if tensor.cut is Cut.INPUT and tensor.input_axis is not None:
        tensor.input_axis.span(rank)
    for part in tensor.parts if tensor.cut is Cut.OUTPUT else ():
        if part.axis is not None:
            part.axis.span(rank)


def _remedy(
    spec: ModelSpec,
    wish: Wish,
    decisions: Decisions,
    weights: Collection[Weight],
    parallel: Parallel,
) -> str:
    """Schemes that hold all of these, and how to leave alone all that they are part of."""
    refused = {module for weight in weights for module in _modules(weight)}
    choices = {choice for module in refused if (choice := decisions[module]) is not None}
    works = []
    choice = choices.pop()
    for other in () if choices else _alternatives(choice):
        changed = _instead(wish, choice, other)
        fitted = written(spec, changed).fitted(plain_parameters(spec), parallel)
        if not any(problem(weight, fitted, parallel) for weight in weights):
            works.append(_called(other))
    found = [f"use {', or '.join(works[:2])}"] if works else []
    if parallel.tensor_parallel_size > 1 and all(weight.experts for weight in weights):
        found.append("or serve whole experts (--enable-expert-parallel), without --for-tp")
    groups = held_together(spec).values()
    whole = [module for group in groups if refused & {*group} for module in group]
    rest = {name for name, one in decisions.items() if one is not None} - {*whole}
    if rest:
        found.append(f"or leave them as they are: --ignore '{ignoring(whole, rest)}'")
    return "; ".join(found).removeprefix("or ") or "give another scheme"


def _alternatives(choice: Choice) -> Iterator[Choice]:
    if choice.scheme in GROUPED:
        for size in _SMALLER_GROUPS:
            if choice.group is not None and size < choice.group:
                yield replace(choice, group_size=size)
    if choice.format != COMPRESSED_TENSORS:
        if choice.scheme in GROUPED:
            yield replace(choice, group_size=-1)
        return
    for scheme in _WITHOUT_GROUPS:
        yield Choice(scheme=scheme)


def _instead(wish: Wish, choice: Choice, other: Choice) -> Wish:
    rules = tuple((pattern, other if one == choice else one) for pattern, one in wish.rules)
    return replace(wish, default=other if wish.default == choice else wish.default, rules=rules)


def _called(choice: Choice) -> str:
    if choice.scheme not in GROUPED:
        return choice.scheme
    return f"{choice.scheme} with --group-size {choice.group or -1}"
