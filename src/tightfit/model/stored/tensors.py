"""All tensors of the files of a rank, under the names of a layout."""

import re
from collections.abc import Iterator
from dataclasses import replace

from tightfit.model.layout import Rank, RankTensor, Weight, on_rank
from tightfit.model.parameters import plain_parameters
from tightfit.model.quantization.recipe import Recipe
from tightfit.model.spec import ModelSpec
from tightfit.model.stored.layouts import StoredLayout
from tightfit.model.stored.names import FamilyNames, constants
from tightfit.model.stored.quantized import placeholders, quantized_tensors


def rank_tensors(spec: ModelSpec, rank: Rank, layout: StoredLayout) -> tuple[RankTensor, ...]:
    """All tensors of one rank's files, in the order of the model.

    Raises:
        LayoutError: the model cannot be cut that way.
    """
    names = layout.family(spec.architecture)
    unbuilt = frozenset(name for tower in spec.towers for name in tower.unbuilt)
    return tuple(
        one
        for weight in plain_parameters(spec)
        if on_rank(weight, rank, spec.num_layers) and weight.name not in unbuilt
        for one in _tensors(weight, spec, rank, names)
    )


def _tensors(
    weight: Weight, spec: ModelSpec, rank: Rank, names: FamilyNames
) -> Iterator[RankTensor]:
    """A parameter, and the constants of the attention layer that it stands for."""
    recipe = spec.quantization
    if isinstance(recipe, Recipe):
        for tensor in quantized_tensors(recipe, weight, rank, spec.dtype):
            yield replace(tensor, name=_stored_name(tensor.name, spec, rank, names))
    else:
        tensor = weight.rank_tensor(rank, spec.dtype)
        yield replace(tensor, name=_stored_name(weight.name, spec, rank, names))
    if not isinstance(weight.where, int):
        return
    for pattern, replacement in names.attention:
        if re.search(pattern, weight.name):
            attention = re.sub(pattern, replacement, weight.name)
            if isinstance(recipe, Recipe):
                for tensor in placeholders(recipe, attention, spec.dtype):
                    yield replace(tensor, name=_renamed(tensor.name, names))
            for name in constants(attention):
                yield RankTensor(
                    name=_renamed(name, names), parameter=None, dtype="F32", shape=(), fill=1.0
                )


def _stored_name(name: str, spec: ModelSpec, rank: Rank, names: FamilyNames) -> str:
    embedding = f"{spec.names.embedding}.weight"
    if name == embedding and spec.tie_word_embeddings and spec.has_lm_head_module:
        last = rank.pp_rank == rank.parallel.pipeline_parallel_size - 1
        everywhere = spec.every_stage_has_ends and spec.every_stage_has_head is not False
        if last or everywhere:
            return min(_renamed(one, names) for one in (embedding, f"{spec.names.head}.weight"))
    return _renamed(name, names)


def _renamed(name: str, names: FamilyNames) -> str:
    for pattern, replacement in names.renamed:
        name = re.sub(pattern, replacement, name)
    return name
