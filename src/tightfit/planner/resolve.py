"""The defaults that every engine resolves alike: dtypes, context length and blocks."""

from tightfit.errors import ConfigError, UsageError
from tightfit.model.spec import ModelSpec, ropes
from tightfit.planner.devices import Device
from tightfit.planner.options import KV_DTYPES, Option, PlanOptions, pick
from tightfit.units import TORCH_DTYPES

_KERNEL_BLOCK = 16
UNSTABLE_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
"""Types of models that overflow in it."""


def resolve_dtype(spec: ModelSpec, options: PlanOptions, device: Device | None) -> Option[str]:
    """The dtype of computation, in safetensors' spelling.

    `auto` is the checkpoint's, and bfloat16 for a float32 checkpoint, as in vLLM
    (`config/model.py: _get_and_verify_dtype`). Where the device has no bfloat16 it is float16, or
    float32 for models that overflow in that.

    Raises:
        UsageError: the device does not compute in it.
    """
    can = device is None or device.bfloat16
    if options.dtype != "auto":
        asked = TORCH_DTYPES[options.dtype]
        if asked == "BF16" and not can:
            assert device is not None
            raise UsageError(
                f"--dtype {options.dtype}, which {device.name} does not compute in",
                hint="--dtype float16, or a GPU with compute capability 8.0 or more",
            )
        return Option(value=asked, origin="flag")
    found = "BF16" if spec.dtype == "F32" else spec.dtype
    if found == "BF16" and not can:
        unstable = spec.model_type in UNSTABLE_IN_FLOAT16
        return Option(value="F32" if unstable else "F16", origin="engine default")
    return Option(value=found, origin="engine default" if spec.dtype == "F32" else "config")


def resolve_kv_dtype(spec: ModelSpec, options: PlanOptions, dtype: str) -> Option[str]:
    """The dtype of the KV cache; `auto` is the checkpoint's wish, or that of computation."""
    if options.kv_cache_dtype == "auto":
        if spec.kv_cache_quantization is not None:
            return Option(value=KV_DTYPES[spec.kv_cache_quantization], origin="config")
        return Option(value=dtype, origin="engine default")
    return Option(value=KV_DTYPES[options.kv_cache_dtype], origin="flag")


def model_max_len(spec: ModelSpec, *, scales_yarn: bool = False) -> int:
    """The longest context that the config allows (vLLM's `_get_and_verify_max_len`).

    Rope scaling of the linear and dynamic kinds multiplies it; the other kinds state the scaled
    length already. `scales_yarn` computes that of yarn from the original one instead.
    """
    found = ropes(spec.layers)
    scaling = found[0].scaling if found else None
    length = spec.max_position_embeddings
    if scaling is None:
        return length
    if scaling["rope_type"] == "yarn" and scales_yarn:
        length = scaling["original_max_position_embeddings"]
    elif scaling["rope_type"] not in ("linear", "dynamic"):
        return length
    factor = scaling.get("factor", 1.0)
    if not isinstance(factor, int | float) or not 0 < factor < 2**20:
        raise ConfigError(f"config.json has the rope factor {factor!r}, not a number")
    return int(length * factor)


def resolve_max_model_len(
    spec: ModelSpec, options: PlanOptions, longest: int, usual: int | None = None
) -> Option[int]:
    """The context length: the flag's, or the config's; -1 is resolved once memory is known.

    Args:
        spec: the model.
        options: what the user asked for.
        longest: what the engine allows (`Engine.longest`).
        usual: what it takes unless it is told, where that is less.

    Raises:
        UsageError: longer than the model allows.
    """
    asked = options.max_model_len
    free = spec.length_is_free or options.allow_long_max_model_len
    if asked is not None and asked > longest and not free:
        hint = f"use at most {longest}"
        if options.engine == "vllm":
            hint += (
                "; --hf-overrides changes the config, and --allow-long-max-model-len plans what "
                "vLLM serves with VLLM_ALLOW_LONG_MAX_MODEL_LEN=1, at the risk of wrong results"
            )
        raise UsageError(f"--max-model-len {asked} is more than the model's {longest}", hint=hint)
    if asked == -1:
        return Option(value=usual or longest, origin="fitted")
    return pick(asked, usual or longest, "config")


def resolve_block_size(options: PlanOptions, usual: int, device: Device | None) -> Option[int]:
    """Tokens of a block of the KV cache; `usual` is the engine's choice.

    Raises:
        UsageError: CUDA kernels read no blocks of this size (vLLM's
            `v1/attention/backends: get_supported_kernel_block_sizes`).
    """
    size = options.block_size
    on_cuda = device is None or device.kind == "cuda"
    if on_cuda and size is not None and size % _KERNEL_BLOCK:
        raise UsageError(
            f"--block-size {size}: attention on a GPU reads {_KERNEL_BLOCK} tokens at a time",
            hint=f"give a multiple of {_KERNEL_BLOCK}, or leave it to the engine",
        )
    return pick(size, usual)
