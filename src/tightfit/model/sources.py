"""Whether a checkpoint holds what its config promises."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, Protocol

from tightfit.errors import CheckpointError
from tightfit.model.layout import Weight
from tightfit.model.parameters import parameters
from tightfit.model.spec import ModelSpec
from tightfit.units import MiB, format_bytes

_FLOATS = ("BF16", "F16", "F32")
_SAME = {"U8": ("U8", "F8_E8M0", "I8"), "I32": ("I32", "U32")}
"""Dtypes that different writers use for the same bits."""

# Buffers that old versions of transformers saved, and that no engine reads (vLLM's
# `AutoWeightsLoader`).
_BUFFERS = re.compile(r"\.(rotary(_pos)?_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)$")

_UNSAVED = re.compile(r"\.(e_score_correction_bias|expert_bias)$")
"""Parameters of engines that are buffers elsewhere, where some tools leave them out."""

_ENCODERS = r"(^|\.)(vision_tower|audio_tower|embed_vision|embed_audio)\."
_TEXT_OF_MORE = {"Gemma3nForCausalLM": _ENCODERS, "Gemma4ForCausalLM": _ENCODERS}
"""Architectures that vLLM serves from a multimodal checkpoint, without the encoders."""


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


class Expected(NamedTuple):
    """A tensor of a checkpoint; its dtype is None if any float will do."""

    shape: tuple[int, ...]
    dtype: str | None
    optional: bool


def source_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model holds, with its shape."""
    return {name: expected.shape for name, expected in expected_sources(spec).items()}


def sources_of(weight: Weight) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint that one weight is made of, with their shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for part in weight.parts:
        shape = weight.source_shape(part)
        if weight.experts and not weight.stacked:
            found |= {part.source.format(expert=e): shape for e in range(weight.experts)}
        else:
            found[part.source] = shape
    return found


@lru_cache(maxsize=2)
def expected_sources(spec: ModelSpec) -> Mapping[str, Expected]:
    """Every tensor that a checkpoint of this model holds, with what is expected of it."""
    found: dict[str, Expected] = {}
    for weight in parameters(spec):
        dtype = None if weight.dtype in _FLOATS else weight.dtype
        for name, shape in sources_of(weight).items():
            found[name] = Expected(shape, dtype, weight.optional)
    return found


def untied(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> ModelSpec:
    """The spec without tying, if the checkpoint holds an `lm_head.weight` nevertheless."""
    if spec.tie_word_embeddings and f"{spec.names.head}.weight" in tensors:
        return replace(spec, tie_word_embeddings=False)
    return spec


def as_base_model(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> ModelSpec:
    """The spec with shorter names, if the checkpoint is of a base model that was saved alone.

    Such names lack their first component: `layers.0...` for `model.layers.0...`. GPT-2, BLOOM and
    most embedding models are published so, and vLLM adds what is missing.
    """
    names = spec.names
    prefix, dot, rest = names.embedding.partition(".")
    if not dot or f"{names.embedding}.weight" in tensors or f"{rest}.weight" not in tensors:
        return spec

    def short(name: str) -> str:
        return name.removeprefix(prefix + dot)

    def renamed(weight: Weight) -> Weight:
        parts = tuple(replace(part, source=short(part.source)) for part in weight.parts)
        return replace(weight, name=short(weight.name), parts=parts)

    return replace(
        spec,
        names=replace(
            names,
            embedding=rest,
            layers=short(names.layers),
            norm=None if names.norm is None else short(names.norm),
        ),
        extras=tuple(map(renamed, spec.extras)),
        verified_for_sharding=False,
    )


def check_sources(spec: ModelSpec, tensors: Mapping[str, Tensor], where: str) -> tuple[str, ...]:
    """Compare the tensors of a checkpoint with those of its model.

    Returns:
        Warnings: of tensors that are not loaded, and of small ones that are not there.

    Raises:
        CheckpointError: a tensor is missing, has another shape, has a dtype that no engine loads,
            or belongs to no part of the model.
    """
    expected = expected_sources(spec)
    missing = [name for name, one in expected.items() if name not in tensors and not one.optional]
    lost = [name for name in missing if not _UNSAVED.search(name)]
    if lost:
        raise CheckpointError(
            f"{where} lacks the tensor {lost[0]!r}{_and_more(lost)}",
            hint="the download is incomplete, or config.json belongs to another model",
        )
    for name, one in expected.items():
        if name in tensors:
            _check(name, one, tensors, spec, where)
    quantization = spec.quantization
    optional = quantization.optional_sources if quantization is not None else ()
    head = f"{spec.names.head}.weight"
    known = {head, *expected} if spec.tie_word_embeddings else expected.keys()
    skipped = [*spec.ignored_sources, _TEXT_OF_MORE.get(spec.architecture, "(?!)")]
    ignored = re.compile("|".join(("(?!)", *optional, _BUFFERS.pattern)))
    unloaded = re.compile("|".join(skipped))
    extra = [name for name in tensors if name not in known and not ignored.search(name)]
    unknown = [name for name in extra if not unloaded.search(name)]
    if unknown:
        raise CheckpointError(
            f"{where} holds the tensor {unknown[0]!r}{_and_more(unknown)}, which "
            f"{spec.architecture} does not have",
            hint="config.json belongs to another model, or misses an option such as a bias",
        )
    return (*_unloaded(extra, tensors, spec.architecture), *_left_out(missing, where))


def _unloaded(
    names: list[str], tensors: Mapping[str, Tensor], architecture: str
) -> tuple[str, ...]:
    size = sum(tensors[name].nbytes for name in names)
    if size < MiB:
        return ()
    return (
        f"{format_bytes(size)} of the checkpoint are not loaded: "
        f"{names[0]!r}{_and_more(names)}, which {architecture} does not use",
    )


def _left_out(names: list[str], where: str) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{where} lacks {names[0]!r}{_and_more(names)}, which some tools do not save: planned as "
        "if they were there",
    )


def _check(
    name: str, expected: Expected, tensors: Mapping[str, Tensor], spec: ModelSpec, where: str
) -> None:
    tensor = tensors[name]
    called = getattr(tensor, "name", name)
    if not _alike(tensor.shape, expected.shape, quantized=spec.quantization is not None):
        raise CheckpointError(
            f"{where}: tensor {called!r} has the shape {list(tensor.shape)}, and config.json "
            f"says {list(expected.shape)}",
            hint="config.json and the weights belong to different models",
        )
    if spec.quantization is None:
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{where}: tensor {called!r} has the dtype {tensor.dtype}, and config.json has no "
                "quantization_config",
                hint="config.json and the weights belong to different models",
            )
        return
    # Some layers are stored in fp8 and held in the model's dtype, as keys of sparse attention.
    scaled = expected.dtype is None and f"{name}_scale_inv" in tensors
    wanted = _FLOATS if expected.dtype is None else _SAME.get(expected.dtype, (expected.dtype,))
    if tensor.dtype not in wanted and not scaled:
        raise CheckpointError(
            f"{where}: tensor {called!r} has the dtype {tensor.dtype}, and the quantization_config "
            f"means {' or '.join(wanted)}",
            hint="config.json and the weights were made by different runs",
        )


def _alike(shape: tuple[int, ...], expected: tuple[int, ...], *, quantized: bool) -> bool:
    """Equal, where a scale may be `[]` or `[1]`, and scales of rows `[n]` or `[n, 1]`."""
    if shape == expected or not quantized:
        return shape == expected
    return [n for n in shape if n != 1] == [n for n in expected if n != 1]


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
