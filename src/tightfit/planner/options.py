"""The options of a plan as the user gave them, and as an engine resolves them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from tightfit.errors import ConfigError, UsageError
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import Device
from tightfit.units import TORCH_DTYPES

T = TypeVar("T")

KV_DTYPES: Mapping[str, str] = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "fp8": "F8_E4M3",
    "fp8_e4m3": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the user asked for; None means the engine's default.

    `max_model_len` of -1 asks for the longest that fits.
    """

    engine: str = "vllm"
    engine_version: str | None = None
    entrypoint: str = "server"
    device: Device | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    block_size: int | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    enforce_eager: bool = False
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    max_cudagraph_capture_size: int | None = None
    use_v2_model_runner: bool | None = None
    """vLLM's VLLM_USE_V2_MODEL_RUNNER; None leaves the choice to the version."""
    tokenizer_json_bytes: int = 0
    """Size of the tokenizer that a rank will hold in memory; 0 if it handles no text."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            UsageError: a value out of its range.
        """
        for name, minimum in (
            ("tensor_parallel_size", 1),
            ("pipeline_parallel_size", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("block_size", 1),
            ("max_cudagraph_capture_size", 1),
            ("kv_cache_memory_bytes", 0),
        ):
            value = getattr(self, name)
            if value is not None and not minimum <= value < 2**50:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} {value} is out of range", hint=f"at least {minimum}")
        sizes = self.cudagraph_capture_sizes
        if sizes is not None and not (sizes and all(0 < size < 2**20 for size in sizes)):
            raise UsageError(
                f"--cudagraph-capture-sizes {' '.join(map(str, sizes))} is out of range",
                hint="numbers of tokens, at least one",
            )
        if self.max_model_len is not None and not (
            self.max_model_len == -1 or 0 < self.max_model_len < 2**40
        ):
            raise UsageError(
                f"--max-model-len {self.max_model_len} is out of range",
                hint="a number of tokens, or -1 for the longest that fits",
            )
        utilization = self.gpu_memory_utilization
        if utilization is not None and not 0 < utilization <= 1:
            raise UsageError(
                f"--gpu-memory-utilization {utilization} is out of range",
                hint="a fraction such as 0.9",
            )
        if self.dtype != "auto" and self.dtype not in TORCH_DTYPES:
            raise UsageError(
                f"unknown --dtype {self.dtype!r}", hint="auto, " + ", ".join(TORCH_DTYPES)
            )
        if self.kv_cache_dtype != "auto" and self.kv_cache_dtype not in KV_DTYPES:
            raise UsageError(
                f"unknown --kv-cache-dtype {self.kv_cache_dtype!r}",
                hint="auto, " + ", ".join(KV_DTYPES),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Option(Generic[T]):
    """A resolved option: its value, and where that came from."""

    value: T
    origin: str
    """flag, config, engine default, or fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Every option that matters to memory, with its default filled in by the engine."""

    dtype: Option[str]
    kv_cache_dtype: Option[str]
    max_model_len: Option[int]
    max_num_seqs: Option[int]
    max_num_batched_tokens: Option[int]
    gpu_memory_utilization: Option[float]
    kv_cache_memory_bytes: Option[int | None]
    block_size: Option[int]
    tensor_parallel_size: Option[int]
    pipeline_parallel_size: Option[int]
    enforce_eager: Option[bool] | None = None
    cudagraph_capture_sizes: Option[tuple[int, ...]] | None = None
    model_runner: Option[str] | None = None
    """What only some engines know is None in the others."""

    def to_json(self) -> dict[str, Any]:
        """The options in schema 1."""
        return {
            field.name: {"value": option.value, "origin": option.origin}
            for field in fields(self)
            if (option := getattr(self, field.name)) is not None
        }


def pick(given: T | None, default: T, origin: str = "engine default") -> Option[T]:
    """The user's value, or a default with its origin."""
    if given is not None:
        return Option(value=given, origin="flag")
    return Option(value=default, origin=origin)


def flag(given: T) -> Option[T]:
    """A value that always comes from the command line, such as a parallel size."""
    return Option(value=given, origin="flag")


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


def resolve_kv_dtype(options: PlanOptions, dtype: str) -> Option[str]:
    """The dtype of the KV cache; `auto` is that of computation."""
    if options.kv_cache_dtype == "auto":
        return Option(value=dtype, origin="engine default")
    return Option(value=KV_DTYPES[options.kv_cache_dtype], origin="flag")


def model_max_len(spec: ModelSpec) -> int:
    """The longest context that the config allows (vLLM's `_get_and_verify_max_len`).

    Rope scaling of the linear and dynamic kinds multiplies it; the other kinds state the scaled
    length already.
    """
    scaling = spec.layers[0].attention.rope.scaling
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
    if asked is not None and asked > longest:
        raise UsageError(
            f"--max-model-len {asked} is more than the model's {longest}",
            hint=f"use at most {longest}",
        )
    if asked == -1:
        return Option(value=longest, origin="fitted")
    return pick(asked, longest, "config")
