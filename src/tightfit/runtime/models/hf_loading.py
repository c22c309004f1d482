"""Building and loading a model by transformers: streaming, from safetensors only.

The class is one of transformers' own, found by the config's `model_type` and `architectures`; code
that comes with a checkpoint is never looked at. With `offload_bytes` accelerate's hooks bring the
last layers from the host to the device for their turn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.errors import CheckpointError, MissingExtraError, UsageError
from tightfit.model.spec import ModelSpec
from tightfit.planner.engines.builtin_transformers import offloaded_layers
from tightfit.runtime.loading.files import TORCH_DTYPES
from tightfit.runtime.models.hf_probe import refused
from tightfit.runtime.options import EngineOptions

_CONFIG = "config.json"
_MOVING = ("dynamic", "longrope")
"""Kinds of rope whose angles depend on the longest sequence of a step."""


def empty_model(checkpoint: Checkpoint, spec: ModelSpec, options: EngineOptions) -> Any:
    """The module without weights, on the meta device, of a model that can run here.

    Raises:
        MissingExtraError: transformers is not installed.
        UnsupportedModelError: the model is not a causal decoder of softmax attention alone, or
            transformers does not know it.
        CheckpointError: transformers cannot make sense of config.json.
    """
    cls, config = _class(_transformers(), checkpoint, spec)
    from accelerate import init_empty_weights

    with _told(spec, checkpoint), init_empty_weights(include_buffers=False):
        model = cls._from_config(config, dtype=TORCH_DTYPES[options.dtype])
    _require_pageable(spec, model, options.max_model_len)
    return model


def load_transformers(
    empty: Any,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    options: EngineOptions,
    *,
    device: torch.device,
    load_format: str = "auto",
) -> Any:
    """The module with weights, for `TransformersModel`.

    Args:
        empty: what `empty_model` gave.
        checkpoint: with local files.
        spec: what was planned.
        options: as the plan resolved them.
        device: where to.
        load_format: `auto`, or `dummy` for random weights.

    Raises:
        CheckpointError: a tensor is missing, or has another shape than the config says.
    """
    offloaded, _ = offloaded_layers(spec, options.dtype, options.cpu_offload_bytes)
    devices = _device_map(spec, empty, device, offloaded)
    with _told(spec, checkpoint):
        if load_format == "dummy":
            model = _filled(empty, devices, options.seed)
        else:
            model = _loaded(empty, checkpoint, TORCH_DTYPES[options.dtype], devices)
            _take_from_files(model)
    return model.eval().requires_grad_(False)


def _take_from_files(model: Any) -> None:
    """Copy what still lies in a file, whose pages nobody has read and so nobody has counted."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _transformers() -> Any:
    """The library, told to be quiet."""
    try:
        import accelerate  # noqa: F401
        import transformers
    except ImportError as error:
        missing = error.name or "transformers"
        raise MissingExtraError("run --model-impl transformers", "hf", missing) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _class(transformers: Any, checkpoint: Checkpoint, spec: ModelSpec) -> tuple[Any, Any]:
    """The class that transformers has for a config, and its object for the config."""
    values = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    if "quantization_config" in values:
        raise refused(spec, "its weights are quantized")
    kind = values.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise refused(
            spec,
            f"transformers {transformers.__version__} does not know model_type {kind!r}, and code "
            "of a checkpoint is never executed",
        )
    with _told(spec, checkpoint):
        config = transformers.CONFIG_MAPPING[kind].from_dict(values)
    cls = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if cls is None or cls.__name__.lower() != spec.architecture.lower():
        raise refused(spec, f"it has no causal language model of that name for {kind!r}")
    return cls, config


def _require_pageable(spec: ModelSpec, model: Any, max_model_len: int) -> None:
    if model.config.is_encoder_decoder:
        raise refused(spec, "it has an encoder, to which its decoder attends")
    if model._is_stateful:
        raise refused(spec, "its layers keep a recurrent state, not keys and values")
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if kinds.isdisjoint(_MOVING):
            continue
        rope = module.config.rope_parameters
        short = rope.get("original_max_position_embeddings", module.config.max_position_embeddings)
        if max_model_len > short:
            raise refused(
                spec,
                "its rope depends on the longest sequence of a step, and other sequences "
                f"would change with it; with --max-model-len {short} it does not",
            )


def _device_map(
    spec: ModelSpec, model: Any, device: torch.device, offloaded: int
) -> dict[str, torch.device | str]:
    """Every module that has parameters of its own, and its device; layers are one each."""
    if not offloaded:
        return {"": device}
    lists = (
        name
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
        if isinstance(module, nn.ModuleList) and len(module) == spec.num_layers
    )
    layers = next(lists, None)
    if layers is None:
        raise refused(spec, "its layers cannot be told apart, to offload the last")
    found: dict[str, torch.device | str] = {}
    for i in range(spec.num_layers):
        found[f"{layers}.{i}"] = "cpu" if i >= spec.num_layers - offloaded else device
    for name, module in model.named_modules():
        owns = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if owns and not name.startswith(f"{layers}."):
            found[name] = device
    return found


def _loaded(empty: Any, checkpoint: Checkpoint, dtype: torch.dtype, devices: dict[str, Any]) -> Any:
    path = checkpoint.source.local_path(_CONFIG)
    if path is None:
        raise UsageError(
            f"{checkpoint.source.label} is not a local directory, and transformers loads no other",
            hint="download the model",
        )
    model, info = type(empty).from_pretrained(
        path.parent,
        config=empty.config,
        dtype=dtype,
        device_map=devices,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.source.label} lacks tensors that its config.json implies, such as "
            f"{wrong[0]!r}",
            hint="config.json and weights are of different models, or files are missing",
        )
    return model


def _filled(model: Any, devices: dict[str, Any], seed: int) -> Any:
    """Small random weights where there were none."""
    from accelerate import dispatch_model
    from accelerate.utils import set_module_tensor_to_device

    def device_of(name: str) -> Any:
        owners = (key for key in devices if not key or name.startswith(f"{key}."))
        return devices[max(owners, key=len)]

    for name, parameter in list(model.named_parameters()):
        device = device_of(name)
        generator = torch.Generator(device=device).manual_seed(seed)
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        values.uniform_(-1e-3, 1e-3, generator=generator)
        set_module_tensor_to_device(model, name, device, value=values)
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        set_module_tensor_to_device(model, name, device_of(name), value=buffer)
    return dispatch_model(model, devices) if len(devices) > 1 else model


@contextmanager
def _told(spec: ModelSpec, checkpoint: Checkpoint) -> Iterator[None]:
    """Put what transformers raises for a wrong config or file into words."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"transformers cannot load {spec.architecture} from {checkpoint.source.label}: "
            f"{lines[0][:200]}",
            hint="check config.json and the weights; `tightfit verify` compares them",
        ) from error
