"""What every scheme would make of the matrices that engines hold as one: bytes, and errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.source import Source
from tightfit.codecs import Codec, codec
from tightfit.errors import TightfitError
from tightfit.model.layout import Parallel, Weight
from tightfit.model.parameters import plain_parameters
from tightfit.model.quantization.recipe import Recipe, split_experts
from tightfit.model.quantization.written import (
    Choice,
    Wish,
    decide,
    matrices,
    module_name,
    written,
)
from tightfit.model.spec import ModelSpec
from tightfit.quantize.admission import problem
from tightfit.quantize.encoding import check_finite, rows_of
from tightfit.quantize.matrices import Matrix, matrices_of
from tightfit.quantize.places import Where, places
from tightfit.runtime.loading.files import TORCH_DTYPES
from tightfit.units import dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a scheme makes of a group; without a choice it stays as it is.

    `squared_error` is ||W-Q||^2 of its matrices together. `damage` sums up ||W-Q||^2 / ||W||^2,
    which is the share of noise in what a matrix gives out for inputs that are alike, times the
    parameters of the matrix.
    """

    choice: Choice | None
    total_bytes: int
    squared_error: float
    damage: float

    @property
    def label(self) -> str | None:
        """What tables call the scheme."""
        return None if self.choice is None else self.choice.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Matrices that are quantized in one way: `modules`, where `experts.0` stands for all."""

    name: str
    modules: tuple[str, ...]
    where: Where
    parameters: int
    squared_norm: float
    options: tuple[Option, ...]
    """By size, the smallest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedGroup:
    """A group whose sizes are known, and not its errors: `made` has its matrices by choice."""

    name: str
    modules: tuple[str, ...]
    where: Where
    made: Mapping[Choice, Sequence[Matrix]]

    @property
    def matrices(self) -> Sequence[Matrix]:
        """Where they lie, whatever becomes of them."""
        return next(iter(self.made.values()))

    @property
    def held_bytes(self) -> int:
        """As it is."""
        found = {matrix.source.name: matrix.source.nbytes for matrix in self.matrices}
        return sum(found.values())

    def total_bytes(self, choice: Choice | None) -> int:
        """With a scheme."""
        if choice is None:
            return self.held_bytes
        outputs = (one for matrix in self.made[choice] for one in matrix.outputs.values())
        return sum(dtype_bytes(one.dtype, prod(one.shape)) for one in outputs)

    @property
    def smallest(self) -> Choice | None:
        """The smallest scheme."""
        return min((None, *self.made), key=self.total_bytes)


def sized_groups(
    checkpoint: Checkpoint, spec: ModelSpec, candidates: Sequence[Wish], parallel: Parallel
) -> list[SizedGroup]:
    """All groups for which there is a candidate that they can have, in the order of the model.

    Args:
        checkpoint: an unquantized one.
        spec: its model.
        candidates: wishes with one scheme each, for everything that is not ignored.
        parallel: a layout in which a scheme has to divide what it gets.

    Raises:
        UsageError: a candidate would ignore a part of what engines hold as one.
    """
    plans = [_Plan.of(checkpoint, spec, wish, parallel) for wish in candidates]
    grouped: dict[str, list[Weight]] = {}
    for weight in matrices(spec):
        name = weight.name.rpartition(".")[0] if weight.experts else weight.name
        grouped.setdefault(name.removesuffix(".weight"), []).append(weight)
    where = places(spec)
    found = []
    for name, weights in grouped.items():
        made = {plan.choice: one for plan in plans if (one := plan.matrices(weights)) is not None}
        if made:
            parts = (part for weight in weights for part in split_experts(weight).parts)
            modules = tuple(dict.fromkeys(module_name(part.source) for part in parts))
            found.append(SizedGroup(name=name, modules=modules, where=where[modules[0]], made=made))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """One candidate, for the whole model."""

    choice: Choice
    decisions: Mapping[str, Choice | None]
    checkpoint: Checkpoint
    parallel: Parallel
    recipe: Recipe

    @classmethod
    def of(cls, checkpoint: Checkpoint, spec: ModelSpec, wish: Wish, parallel: Parallel) -> "_Plan":
        (choice,) = wish.choices
        recipe = written(spec, wish).fitted(plain_parameters(spec), parallel)
        return cls(
            choice=choice,
            decisions=decide(spec, wish),
            checkpoint=checkpoint,
            parallel=parallel,
            recipe=recipe,
        )

    def matrices(self, weights: Sequence[Weight]) -> Sequence[Matrix] | None:
        """None if the scheme cannot hold one of the weights, or is not wanted for them."""
        found: dict[str, Matrix] = {}
        tensors = self.checkpoint.tensors()
        for weight in weights:
            if self.decisions[_module(weight)] is None:
                return None
            if problem(weight, self.recipe, self.parallel) is not None:
                return None
            try:
                for matrix in matrices_of(weight, self.decisions, tensors):
                    found.setdefault(matrix.module, matrix)
            except TightfitError:
                return None
        return tuple(found.values())


def measured(group: SizedGroup, source: Source, *, search: bool = False) -> Group:
    """Read a group once, and find the errors of everything that may become of it.

    Args:
        group: of a checkpoint.
        source: its files.
        search: look for scales with the least error.

    Raises:
        CheckpointError: weights that are truncated or not finite.
    """
    some = group.matrices
    dtype = TORCH_DTYPES[some[0].source.dtype]
    coders = {choice: codec(choice, dtype) for choice in group.made}
    amax = _amax(some, source) if any(coder.needs_amax for coder in coders.values()) else {}
    norm = 0.0
    errors: dict[Choice | None, float] = dict.fromkeys((None, *coders), 0.0)
    damages = dict(errors)
    for matrix in some:
        one, found = _errors(matrix, source, coders, amax.get(matrix.fused), search)
        norm += one
        for choice, error in found.items():
            errors[choice] += error
            damages[choice] += matrix.rows * matrix.columns * error / one if one else 0.0
    options = [
        Option(
            choice=choice,
            total_bytes=group.total_bytes(choice),
            squared_error=errors[choice],
            damage=damages[choice],
        )
        for choice in errors
    ]
    return Group(
        name=group.name,
        modules=group.modules,
        where=group.where,
        parameters=sum(matrix.rows * matrix.columns for matrix in some),
        squared_norm=norm,
        options=tuple(sorted(options, key=lambda option: option.total_bytes)),
    )


def _errors(
    matrix: Matrix,
    source: Source,
    coders: Mapping[Choice, Codec],
    amax: Tensor | None,
    search: bool,
) -> tuple[float, dict[Choice, float]]:
    """||W||^2, and ||W-Q||^2 of every choice."""
    step = max(coder.row_step for coder in coders.values())
    norms: list[float] = []
    errors: dict[Choice, list[float]] = {choice: [] for choice in coders}
    for rows in rows_of(matrix, source, step):
        check_finite(rows, matrix)
        norms.append(_squares(rows))
        for choice, coder in coders.items():
            scales = coder.scales(rows, amax, search=search)
            values = coder.values(coder.codes(rows.clone(), scales), scales)
            errors[choice].append(_squares(values.sub_(rows)))
    return math.fsum(norms), {choice: math.fsum(some) for choice, some in errors.items()}


def _amax(some: Sequence[Matrix], source: Source) -> dict[str, Tensor]:
    """The largest absolute value of all that an engine holds as one."""
    found: dict[str, Tensor] = {}
    for matrix in some:
        for rows in rows_of(matrix, source, 1):
            largest = rows.abs().amax()
            found[matrix.fused] = torch.maximum(found.get(matrix.fused, largest), largest)
    return found


def _squares(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _module(weight: Weight) -> str:
    return module_name(split_experts(weight).parts[0].source)
