"""Which matrices a scheme cannot hold, whole or cut for several ranks: known before any is read.

Groups and blocks of scales have to divide the inputs of a matrix, and the share of each rank where
an engine cuts along them; blocks have to divide what engines fuse; words have to be full.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tightfit.errors import LayoutError, TightfitError
from tightfit.model.layout import Cut, Parallel, Rank, Weight
from tightfit.model.parameters import check_parallel, plain_parameters
from tightfit.model.quantization.recipe import Recipe, split_experts
from tightfit.model.quantization.written import (
    COMPRESSED_TENSORS,
    GROUPED,
    Choice,
    Decisions,
    Wish,
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
    """Some matrices cannot be quantized as asked; `refusals` are all of them."""

    def __init__(self, refusals: tuple[Refusal, ...]) -> None:
        first, *others = refusals
        more = f" (and {len(others)} more, see --dry-run)" if others else ""
        super().__init__(f"{first}{more}", hint=first.remedy)
        self.refusals = refusals


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
    found = tuple(_refusals(spec, wish, decisions, parallel))
    if found:
        raise RefusedError(found)


def lost_sizes(spec: ModelSpec, wish: Wish, decisions: Decisions) -> dict[int, Refusal]:
    """Common tensor parallel sizes that the model allows, and its quantized form does not."""
    found = {}
    for size in COMMON_SIZES:
        try:
            admit(spec, wish, decisions, tensor_parallel_size=size)
        except RefusedError as error:
            found[size] = error.refusals[0]
        except LayoutError:
            continue
    return found


def short_names(modules: Iterable[str]) -> tuple[str, ...]:
    """Names without the numbers of layers and experts: `model.layers.*.mlp.down_proj`."""
    return tuple(Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in modules))


def _refusals(
    spec: ModelSpec, wish: Wish, decisions: Decisions, parallel: Parallel
) -> Iterator[Refusal]:
    recipe = written(spec, wish)
    fitted = recipe.fitted(plain_parameters(spec), parallel)
    found: defaultdict[tuple[Choice, str], list[Weight]] = defaultdict(list)
    for weight in matrices(spec):
        choice = decisions[module_name(split_experts(weight).parts[0].source)]
        if choice is not None and (reason := problem(weight, fitted, parallel)):
            found[choice, reason].append(weight)
    for (choice, reason), weights in found.items():
        modules = [
            module_name(part.source) for weight in weights for part in split_experts(weight).parts
        ]
        names = short_names(modules)
        yield Refusal(
            modules=names,
            matrices=sum(len(w.parts) * max(w.experts, 1) for w in weights),
            scheme=choice.label,
            reason=reason,
            remedy=_remedy(spec, wish, choice, weights, parallel),
        )


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
    spec: ModelSpec, wish: Wish, choice: Choice, weights: list[Weight], parallel: Parallel
) -> str:
    """Schemes that hold all of these, and how to leave them alone."""
    works = []
    for other in _alternatives(choice):
        changed = _instead(wish, choice, other)
        fitted = written(spec, changed).fitted(plain_parameters(spec), parallel)
        if not any(problem(weight, fitted, parallel) for weight in weights):
            works.append(_called(other))
    found = [f"this would do: {', or '.join(works[:2])}"] if works else []
    if parallel.tensor_parallel_size > 1 and all(weight.experts for weight in weights):
        found.append("or serve whole experts (--enable-expert-parallel), without --for-tp")
    ends = sorted({end for weight in weights for end in _ends(weight)})
    found.append(f"or leave them as they are: --ignore '{'|'.join(ends)}'")
    return "; ".join(found).removeprefix("or ")


def _ends(weight: Weight) -> Iterator[str]:
    """Patterns for all that has to stay as it is if a weight does."""
    if weight.experts:
        yield r"\.experts\."
        return
    for part in weight.parts:
        yield re.escape(".".join(module_name(part.source).split(".")[-2:])) + "$"


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
    size = f"groups of {choice.group}" if choice.group else "whole rows"
    return f"{choice.scheme} with {size}"
