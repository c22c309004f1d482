"""The tensors that a rank of the runtime holds, in the dtypes in which it holds them.

They are an engine's: parts are fused, and what stands for a quantized matrix is cut like it. Left
out is what only kernels of others need.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from tightfit.checkpoint.header import TensorInfo
from tightfit.errors import UnsupportedModelError
from tightfit.model.layout import Rank, RankTensor, Weight, on_rank
from tightfit.model.quantization.forms import Form
from tightfit.model.quantization.recipe import Inputs, Recipe
from tightfit.model.spec import ModelSpec
from tightfit.model.stored.quantized import in_blocks, quantized_tensors
from tightfit.planner.engines.builtin_models import unexecuted
from tightfit.runtime.loading.files import TORCH_DTYPES

_STACKED_KINDS = {"blocks": "weight_packed", "scales": "weight_scale"}
"""MXFP4's names in gpt-oss, and those that others have for the same."""
_VLLM = 0, 32
"""What this version does not load, such as inputs sorted into groups, is not executed either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """What stands for a weight on a rank; forms and tensors are by kind."""

    name: str
    experts: int
    part_rows: tuple[int, ...]
    columns: int
    forms: Mapping[str, Form]
    tensors: Mapping[str, str]
    """Their names as parameters."""
    inputs: Inputs | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParameters:
    """Tensors to load, those of them with dtypes of their own, and the matrices they stand for."""

    tensors: tuple[RankTensor, ...]
    dtypes: Mapping[str, torch.dtype]
    quantized: tuple[QuantizedWeight, ...]

    def settled(self, stored: Mapping[str, TensorInfo]) -> tuple[RankTensor, ...]:
        """The tensors as a plain checkpoint has them.

        Raises:
            CheckpointError: one has more or fewer elements than are expected of it.
        """
        shapes = {name: info.shape for name, info in stored.items()}
        return tuple(t.settled(shapes) if t.parameter in self.dtypes else t for t in self.tensors)


def rank_parameters(
    spec: ModelSpec, weights: Iterable[Weight], rank: Rank, dtype: str
) -> RankParameters:
    """What a rank holds of some weights, those of its stage.

    Args:
        spec: the model.
        weights: as if nothing were quantized.
        rank: which share.
        dtype: of computation, in safetensors' spelling.

    Raises:
        LayoutError: the layout, or the scheme, does not divide a weight.
        UnsupportedModelError: a quantization that is not executed.
    """
    recipe = in_blocks(spec.quantization) if isinstance(spec.quantization, Recipe) else None
    tensors: list[RankTensor] = []
    dtypes: dict[str, torch.dtype] = {}
    found: list[QuantizedWeight] = []
    for weight in weights:
        if not on_rank(weight, rank, spec.num_layers):
            continue
        if recipe is None or recipe.forms(weight) is None:
            plain = weight if recipe is None else recipe.padded(weight)
            tensors.append(plain.rank_tensor(rank, spec.dtype))
            if (own := plain.held_dtype(dtype)) != dtype:
                dtypes[plain.name] = TORCH_DTYPES[own]
            continue
        forms_by_kind: dict[str, Form] = {}
        names: dict[str, str] = {}
        for (form, held), tensor in zip(
            recipe.created(weight), quantized_tensors(recipe, weight, rank, spec.dtype), strict=True
        ):
            assert form is not None
            if held.dropped:
                continue
            tensors.append(tensor)
            dtypes[held.name] = TORCH_DTYPES[held.held_dtype(dtype)]
            if form.engine_kind is not None:
                form = replace(form, kind=_STACKED_KINDS[form.kind])
            forms_by_kind[form.kind], names[form.kind] = form, held.name
        padded = recipe.padded(weight)
        found.append(
            QuantizedWeight(
                name=weight.name,
                experts=weight.experts,
                part_rows=padded.part_rows(rank),
                columns=padded.rank_shape(rank)[-1],
                forms=forms_by_kind,
                tensors=names,
                inputs=recipe.inputs(weight),
            )
        )
    return RankParameters(tensors=tuple(tensors), dtypes=dtypes, quantized=tuple(found))


def require_executable(spec: ModelSpec) -> None:
    """Refuse models and quantizations that the runtime does not execute.

    Raises:
        UnsupportedModelError: this is one.
    """
    if (feature := unexecuted(spec)) is not None:
        raise UnsupportedModelError(
            f"the built-in runtime cannot execute {spec.architecture}: {feature}",
            hint="plan with --engine vllm, and serve this model with vLLM",
        )
    recipe = spec.quantization
    if recipe is None:
        return
    why = recipe.refusal(_VLLM)
    if not isinstance(recipe, Recipe):
        why = "weights that are quantized while they are loaded"
    if why is not None:
        raise UnsupportedModelError(
            f"the built-in runtime cannot execute {recipe.name}: {why}",
            hint="plan with --engine vllm, and serve this checkpoint with vLLM",
        )
