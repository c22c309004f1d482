"""What model a checkpoint holds: its config, held against its headers where it has weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.files import read_config
from tightfit.checkpoint.header import TensorInfo
from tightfit.checkpoint.source import Source
from tightfit.errors import CheckpointError, UnknownArchitectureError
from tightfit.model.aliases import aligned
from tightfit.model.families import model_spec
from tightfit.model.families.pooling import pooling
from tightfit.model.sources import Tensor, as_base_model, check_sources, untied
from tightfit.model.spec import ModelSpec

_CHUNK_BYTES = 2**23
_MODELOPT = "hf_quant_config.json"
_SENTENCES = "modules.json"
"""Of Sentence Transformers: vLLM then serves embeddings, whatever the architecture is called."""
_PROMISED = re.compile(
    r"(?<![a-z0-9])(fp8|nvfp4|mxfp[48]|awq|gptq|int[48]|w[48]a(?:4|8|16)|bnb|[48]-?bit)(?![a-z0-9])",
    re.IGNORECASE,
)
"""What names of quantized checkpoints say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A model, and whether its weights were seen (by their headers) or only promised."""

    spec: ModelSpec
    from_headers: bool
    warnings: tuple[str, ...] = ()


def describe(
    checkpoint: Checkpoint, overrides: Mapping[str, Any] = MappingProxyType({})
) -> Description:
    """Describe the model of a checkpoint, and check its tensors if it has any.

    Args:
        checkpoint: wherever it is.
        overrides: values for keys of its config, as vLLM's `--hf-overrides`.

    Raises:
        ConfigError: config.json is wrong.
        UnsupportedModelError: the architecture is not modelled.
        CheckpointError: a tensor is missing, or is not what config.json says.
    """
    try:
        config = with_modelopt(checkpoint.config, checkpoint.source)
        spec = model_spec(overridden(config, overrides))
    except UnknownArchitectureError as error:
        from tightfit.checkpoint.unknown import unknown_spec

        spec = unknown_spec(checkpoint, error)
        return Description(spec=spec, from_headers=checkpoint.has_weights)
    if checkpoint.source.exists(_SENTENCES):
        spec = pooling(spec)
    if not checkpoint.has_weights:
        return Description(spec=spec, from_headers=False, warnings=_warnings(spec, checkpoint.name))
    spec = as_base_model(spec, checkpoint.tensors())
    tensors, alias = aligned(spec, checkpoint.tensors(), checkpoint.name)
    if alias is not None:
        spec = replace(spec, alias=alias)
    if untied(spec, tensors) is not spec and not _tables_are_equal(checkpoint, spec, tensors):
        # Fine-tuning and quantizing leave such checkpoints, and vLLM unties them as well.
        spec = untied(spec, tensors)
    warnings = check_sources(spec, tensors, checkpoint.name)
    if alias is not None:
        warnings += (f"tensors such as {alias!r} have other names than in published checkpoints",)
    return Description(spec=spec, from_headers=True, warnings=warnings)


def overridden(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The config with other values: nested configs are merged, all else is replaced.

    (`config/model.py: _apply_dict_overrides`; `rope_scaling` is `rope_parameters` by its old name.)
    """
    result = dict(config)
    for key, value in overrides.items():
        before = result.get(key)
        merges = key.endswith("_config") and key != "quantization_config"
        if merges and isinstance(before, Mapping) and isinstance(value, Mapping):
            value = overridden(before, value)
        if key in _ROPE:
            result = {k: v for k, v in result.items() if k not in _ROPE}
        result[key] = value
    return result


_ROPE = ("rope_scaling", "rope_parameters")


def with_modelopt(config: Mapping[str, Any], source: Source) -> Mapping[str, Any]:
    """The config, with the quantization that ModelOpt writes into a file beside it."""
    if config.get("quantization_config") is not None or not source.exists(_MODELOPT):
        return config
    section = {**read_config(source, _MODELOPT), "quant_method": "modelopt"}
    return {**config, "quantization_config": section}


def _warnings(spec: ModelSpec, name: str) -> tuple[str, ...]:
    """That a name promises what neither the config nor a header says."""
    promised = _PROMISED.search(name.rstrip("/").rpartition("/")[2])
    if spec.quantization is not None or promised is None:
        return ()
    return (
        f"the name {name!r} says {promised[0]}, and config.json declares no quantization: the plan "
        f"is that of unquantized weights. ModelOpt keeps it in {_MODELOPT}, which belongs beside "
        "config.json; with the weights' headers there is no doubt",
    )


def require_weights(checkpoint: Checkpoint, command: str) -> None:
    """Refuse a checkpoint without safetensors.

    Raises:
        CheckpointError: it has none, or is a sharded one.
    """
    if checkpoint.has_weights:
        return
    if checkpoint.is_sharded:
        raise CheckpointError(
            f"{checkpoint.name} is sharded, and `tightfit {command}` needs a plain checkpoint",
            hint="give the model that it was made from",
        )
    if checkpoint.unusable_weights:
        raise CheckpointError(
            f"{checkpoint.name} has its weights in {checkpoint.unusable_weights[0]!r}, and "
            "tightfit reads safetensors only",
            hint="load it with transformers and save_pretrained() it, which writes safetensors",
        )
    raise CheckpointError(
        f"{checkpoint.name} has no weights",
        hint="give the directory that holds config.json and the .safetensors files"
        + (", or --load-format dummy for random weights" if command == "run" else ""),
    )


def _tables_are_equal(
    checkpoint: Checkpoint, spec: ModelSpec, tensors: Mapping[str, Tensor]
) -> bool:
    """Whether the head is the embedding once more, which vLLM ties again after loading."""
    head = tensors[f"{spec.names.head}.weight"]
    embedding = tensors.get(f"{spec.names.embedding}.weight")
    if not isinstance(head, TensorInfo) or not isinstance(embedding, TensorInfo):
        return False
    if (head.dtype, head.nbytes) != (embedding.dtype, embedding.nbytes):
        return False
    if checkpoint.source.local_path(head.file) is None:
        return False

    def chunk(tensor: TensorInfo, at: int) -> bytes:
        stop = min(at + _CHUNK_BYTES, tensor.nbytes)
        return checkpoint.source.read(tensor.file, tensor.offset + at, tensor.offset + stop)

    return all(
        chunk(head, at) == chunk(embedding, at) for at in range(0, head.nbytes, _CHUNK_BYTES)
    )
