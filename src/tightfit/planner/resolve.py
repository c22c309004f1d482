"""The defaults that every engine resolves alike: dtypes and the context length."""

from tightfit.errors import ConfigError, UsageError
from tightfit.model.spec import ModelSpec, ropes
from tightfit.planner.options import KV_DTYPES, Option, PlanOptions, pick
from tightfit.units import TORCH_DTYPES


def resolve_dtype(spec: ModelSpec, options: PlanOptions) -> Option[str]:
    """The dtype of computation, in safetensors' spelling.

    `auto` is the checkpoint's, and bfloat16 for a float32 checkpoint, as in vLLM
    (`config/model.py: _get_and_verify_dtype`).
    """
    if options.dtype != "auto":
        return Option(value=TORCH_DTYPES[options.dtype], origin="flag")
    if spec.dtype == "F32":
        return Option(value="BF16", origin="engine default")
    return Option(value=spec.dtype, origin="config")


def resolve_kv_dtype(spec: ModelSpec, options: PlanOptions, dtype: str) -> Option[str]:
    """The dtype of the KV cache; `auto` is the checkpoint's wish, or that of computation."""
    if options.kv_cache_dtype == "auto":
        if spec.kv_cache_quantization is not None:
            return Option(value=KV_DTYPES[spec.kv_cache_quantization], origin="config")
        return Option(value=dtype, origin="engine default")
    return Option(value=KV_DTYPES[options.kv_cache_dtype], origin="flag")


def model_max_len(spec: ModelSpec) -> int:
    """The longest context that the config allows (vLLM's `_get_and_verify_max_len`).

    Rope scaling of the linear and dynamic kinds multiplies it; the other kinds state the scaled
    length already.
    """
    found = ropes(spec.layers)
    scaling = found[0].scaling if found else None
    length = spec.max_position_embeddings
    if scaling is not None and scaling["rope_type"] in ("linear", "dynamic"):
        factor = scaling.get("factor", 1.0)
        if not isinstance(factor, int | float) or not 0 < factor < 2**20:
            raise ConfigError(f"config.json has the rope factor {factor!r}, not a number")
        length = int(length * factor)
    return length


def resolve_max_model_len(spec: ModelSpec, options: PlanOptions) -> Option[int]:
    """The context length: the flag's, or the config's; -1 is resolved once memory is known.

    Raises:
        UsageError: longer than the model allows.
    """
    longest = model_max_len(spec)
    asked = options.max_model_len
    if asked is not None and asked > longest and not spec.length_is_free:
        raise UsageError(
            f"--max-model-len {asked} is more than the model's {longest}",
            hint=f"use at most {longest}",
        )
    if asked == -1:
        return Option(value=longest, origin="fitted")
    return pick(asked, longest, "config")
