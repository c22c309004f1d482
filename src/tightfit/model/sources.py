"""Whether a checkpoint holds what its config promises."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from tightfit.errors import CheckpointError
from tightfit.model.parameters import parameters
from tightfit.model.spec import ModelSpec

_FLOATS = ("BF16", "F16", "F32")

# Buffers that old versions of transformers saved, and that no engine reads.
_BUFFERS = r"\.(rotary_emb\.inv_freq|masked_bias)$"


class Tensor(Protocol):
    """What is needed to know of a tensor in a file."""

    @property
    def dtype(self) -> str:
        """In safetensors' spelling."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def nbytes(self) -> int:
        """Its bytes."""


def source_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model holds, with its shape."""
    found: dict[str, tuple[int, ...]] = {}
    for weight in parameters(spec):
        for part in weight.parts:
            shape = weight.source_shape(part)
            if weight.experts and not weight.stacked:
                found |= {part.source.format(expert=e): shape for e in range(weight.experts)}
            else:
                found[part.source] = shape
    return found


def untied(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> ModelSpec:
    """The spec without tying, if the checkpoint holds an `lm_head.weight` nevertheless."""
    if spec.tie_word_embeddings and f"{spec.names.head}.weight" in tensors:
        return replace(spec, tie_word_embeddings=False)
    return spec


def check_sources(spec: ModelSpec, tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare the tensors of a checkpoint with those of its model.

    Raises:
        CheckpointError: a tensor is missing, has another shape, has a dtype that no engine loads,
            or belongs to no part of the model.
    """
    expected = source_shapes(spec)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{where} lacks the tensor {missing[0]!r}{_and_more(missing)}",
            hint="the download is incomplete, or config.json belongs to another model",
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has the shape {list(tensor.shape)}, and config.json "
                f"says {list(shape)}",
                hint="config.json and the weights belong to different models",
            )
        if tensor.dtype not in _FLOATS and spec.quantization is None:
            raise CheckpointError(
                f"{where}: tensor {name!r} has the dtype {tensor.dtype}, and config.json has no "
                "quantization_config",
                hint="config.json and the weights belong to different models",
            )
    head = f"{spec.names.head}.weight"
    known = {head, *expected} if spec.tie_word_embeddings else expected.keys()
    ignored = re.compile("|".join((_BUFFERS, *spec.ignored_sources)))
    unknown = [name for name in tensors if name not in known and not ignored.search(name)]
    if unknown:
        raise CheckpointError(
            f"{where} holds the tensor {unknown[0]!r}{_and_more(unknown)}, which "
            f"{spec.architecture} does not have",
            hint="config.json belongs to another model, or misses an option such as a bias",
        )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
