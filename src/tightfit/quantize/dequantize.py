"""A quantized checkpoint as if it were none: its matrices are decoded when they are read."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.describe import describe, require_weights, with_modelopt
from tightfit.checkpoint.files import INDEX
from tightfit.checkpoint.header import TensorInfo
from tightfit.checkpoint.source import Source
from tightfit.codecs.decoders import VALUES, StoredMatrix, stored_matrix
from tightfit.errors import UnsupportedModelError
from tightfit.model.layout import Weight
from tightfit.model.parameters import plain_parameters
from tightfit.model.quantization.base import Quantization
from tightfit.model.quantization.recipe import Recipe, split_experts
from tightfit.model.sources import expected_sources, sources_of
from tightfit.model.spec import ModelSpec
from tightfit.quantize.computed_source import FILE, ComputedSource, Kept, Made
from tightfit.quantize.decoding import read_stored, some_rows
from tightfit.quantize.matrices import FLOATS, Output, place
from tightfit.runtime.loading.files import TORCH_DTYPES

_CHUNK_ELEMENTS = 2**20
_SECTIONS = ("quantization_config", "compression_config")
_HIDDEN = frozenset(
    (INDEX, "hf_quant_config.json", "quant_config.json", "quantize_config.json", "recipe.yaml")
)
"""What tells of a quantization beside the config, or is wrong without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A matrix, and where it goes in the tensor that it becomes a part of (as in `Matrix`)."""

    stored: StoredMatrix
    first: int
    pitch: int
    transposed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A tensor that is decoded: one matrix, or those of all experts."""

    elements: int
    dtype: str
    members: tuple[Member, ...]


class DequantizedSource(ComputedSource[Decoded]):
    """Matrices of `base`, decoded."""

    def make(self, unit: Decoded) -> Mapping[str, Tensor]:
        """Decode a tensor.

        Raises:
            CheckpointError: a file ends early.
            UnsupportedModelError: inputs are sorted into groups.
        """
        tensor = torch.empty(unit.elements, dtype=TORCH_DTYPES[unit.dtype])
        for one in unit.members:
            rows, columns = one.stored.rows, one.stored.columns
            if one.transposed:
                target = tensor.as_strided((columns, rows), (one.pitch, 1), one.first).T
            else:
                target = tensor.as_strided((rows, columns), (one.pitch, 1), one.first)
            _decode(one.stored, self.base, target)
        return {"weight": tensor}

    def inputs(self, unit: Decoded) -> Iterable[TensorInfo]:
        """What it is decoded from."""
        return (info for one in unit.members for info in one.stored.tensors.values())

    def exists(self, path: str) -> bool:
        """Whether there is such a file; none that tells of a quantization."""
        return path not in _HIDDEN and super().exists(path)

    def files(self) -> list[str]:
        """Names of the files, but for those that tell of a quantization."""
        return [name for name in super().files() if name not in _HIDDEN]


def open_dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The unquantized checkpoint that a quantized one stands for, in the model's own dtype.

    One that is not quantized is returned as it is. Its config has no `quantization_config`, and
    scales of activations and of the KV cache are left out.

    Raises:
        UnsupportedModelError: a method, or a detail of one, that is not decoded.
        CheckpointError: it lacks weights, or they are not what config.json says.
    """
    require_weights(checkpoint, "quantize")
    spec = describe(checkpoint).spec
    recipe = spec.quantization
    if recipe is None:
        return checkpoint
    config = with_modelopt(checkpoint.config, checkpoint.source)
    _check_method(recipe, config)
    tensors = checkpoint.tensors()
    plain = replace(spec, quantization=None)
    decoded = _decoded(recipe, tensors)
    scales = re.compile("|".join(("(?!)", *recipe.optional_sources)))
    expected = expected_sources(plain)

    def is_kept(name: str) -> bool:
        module, _, kind = name.rpartition(".")
        if module in decoded and kind != "bias":
            return False
        return name in expected or scales.search(name) is None

    kept = [
        Kept(name=name, source=checkpoint.source, info=info)
        for name, info in tensors.items()
        if is_kept(name)
    ]
    source = DequantizedSource(checkpoint.source, kept, list(_made(plain, decoded)))
    return Checkpoint(
        name=checkpoint.name,
        source=source,
        config=_without_quantization(checkpoint.config),
        files=(FILE,),
        has_weights=True,
        known=source.tensors(),
    )


def _check_method(recipe: Quantization, config: Mapping[str, Any]) -> None:
    """Refuse what the names and shapes of tensors do not tell."""
    section = _section(config)
    why = None
    if not isinstance(recipe, Recipe) or not recipe.splits_experts:
        why = "no codec of ours decodes its stacked experts"
    elif section.get("desc_act") is True and section.get("group_size", -1) != -1:
        why = "its inputs are sorted into groups by activation order (desc_act)"
    elif section.get("checkpoint_format") == "gptq_v2":
        why = "its zero points are those of gptq_v2"
    if why is not None:
        raise UnsupportedModelError(
            f"the checkpoint ({recipe.name}) cannot be dequantized: {why}",
            hint="give the unquantized model",
        )


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    places = (config, text if isinstance(text, Mapping) else {})
    found = (place.get(name) for place in places for name in _SECTIONS)
    return next((one for one in found if isinstance(one, Mapping)), {})


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in config.items() if name not in _SECTIONS}
    if isinstance(text := found.get("text_config"), Mapping):
        found["text_config"] = {n: value for n, value in text.items() if n not in _SECTIONS}
    return found


def _decoded(recipe: Quantization, tensors: Mapping[str, TensorInfo]) -> dict[str, StoredMatrix]:
    """The matrices of a checkpoint that are quantized, by module.

    Those of layers that no engine loads as well, such as further ones that predict tokens.

    Raises:
        UnsupportedModelError: one that is not decoded.
    """
    assert isinstance(recipe, Recipe)
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, _, kind = name.rpartition(".")
        modules.setdefault(module, {})[kind] = info
    everywhere = tuple(dict.fromkeys(rule.forms for rule in recipe.rules if rule.forms))
    found = {}
    for module, held in modules.items():
        values = next((held[kind] for kind in VALUES if kind in held), None)
        if values is None or values.dtype in FLOATS:
            continue
        own = recipe.module_forms(module)
        matrix = stored_matrix((*((own,) if own else ()), *everywhere), held)
        if matrix is None or "weight_g_idx" in held:
            kinds = ", ".join(f"{kind} {info.dtype}" for kind, info in sorted(held.items()))
            raise UnsupportedModelError(
                f"{module} cannot be dequantized: no codec decodes {kinds} of {recipe.name}",
                hint="give the unquantized model",
            )
        found[module] = matrix
    return found


def _made(spec: ModelSpec, decoded: dict[str, StoredMatrix]) -> Iterator[Made[Decoded]]:
    """The tensors of a plain checkpoint that matrices become; experts are stacked if they are."""
    left = dict(decoded)
    for weight in plain_parameters(spec):
        if weight.stacked:
            yield from _stacked(weight, spec.dtype, left)
    for module, matrix in left.items():
        member = Member(stored=matrix, first=0, pitch=matrix.columns, transposed=False)
        shape = (matrix.rows, matrix.columns)
        yield _tensor(f"{module}.weight", shape, spec.dtype, (member,))


def _stacked(weight: Weight, dtype: str, left: dict[str, StoredMatrix]) -> Iterator[Made[Decoded]]:
    modules = [
        (apart.source.format(expert=expert).removesuffix(".weight"), part, expert)
        for part, apart in zip(weight.parts, split_experts(weight).parts, strict=True)
        for expert in range(weight.experts)
    ]
    if any(module not in left for module, _, _ in modules):
        return
    members: dict[str, list[Member]] = {}
    for module, part, expert in modules:
        rows, first, pitch = place(weight, part, expert)
        matrix = left.pop(module)
        assert (matrix.rows, matrix.columns) == (rows, weight.columns), module
        member = Member(stored=matrix, first=first, pitch=pitch, transposed=weight.transposed)
        members.setdefault(part.source, []).append(member)
    for name, shape in sources_of(weight).items():
        yield _tensor(name, shape, dtype, tuple(members[name]))


def _tensor(
    name: str, shape: tuple[int, ...], dtype: str, members: tuple[Member, ...]
) -> Made[Decoded]:
    unit = Decoded(elements=prod(shape), dtype=dtype, members=members)
    return Made(unit=unit, outputs={"weight": Output(name=name, dtype=dtype, shape=shape)})


def _decode(matrix: StoredMatrix, source: Source, target: Tensor) -> None:
    """Some rows at a time, so that floats of 32 bits are never there of all."""
    codec, rows = matrix.codec, matrix.rows
    stored = read_stored(matrix.tensors, source)
    if (order := stored.get("g_idx")) is not None:
        _check_order(order, codec.group_size or matrix.columns, matrix)
    step = max(_CHUNK_ELEMENTS // (matrix.columns * codec.row_step), 1) * codec.row_step
    for row in range(0, rows, step):
        count = min(step, rows - row)
        target[row : row + count] = codec.decode(some_rows(codec, stored, rows, row, count))


def _check_order(order: Tensor, group_size: int, matrix: StoredMatrix) -> None:
    if not torch.equal(order, torch.arange(matrix.columns, dtype=order.dtype) // group_size):
        raise UnsupportedModelError(
            f"{matrix.tensors['g_idx'].name} sorts inputs into groups, which is not decoded",
            hint="give the unquantized model, or one quantized without desc_act",
        )
