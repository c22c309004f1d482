"""The options of a plan as the user gave them, and as an engine resolves them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tightfit.errors import UnsupportedModelError, UsageError
from tightfit.planner.devices import Device
from tightfit.units import TORCH_DTYPES

if TYPE_CHECKING:
    from tightfit.model.quantization.written import Wish

T = TypeVar("T")

KV_DTYPES: Mapping[str, str] = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "fp8": "F8_E4M3",
    "fp8_e4m3": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2",
    "fp8_ds_mla": "fp8_ds_mla",
    "int8_per_token_head": "int8_per_token_head",
    "fp8_per_token_head": "fp8_per_token_head",
    "int4_per_token_head": "int4_per_token_head",
    "nvfp4": "nvfp4",
}
"""vLLM's names of cache dtypes, and safetensors' where it has one: packed forms keep theirs."""

_UNMODELLED_KV_DTYPES = """fp8_inc nvfp4_ds_mla nvfp4_4over6 ultraquant_4bit turboquant_k8v4
    turboquant_4bit_nc turboquant_k3v4_nc turboquant_3bit_nc"""
"""vLLM's others (`config/cache.py: CacheDType`)."""

_WORDS: Mapping[str, tuple[str, ...]] = {
    "entrypoint": ("server", "llm"),
    "dtype": ("auto", *TORCH_DTYPES),
    "kv_cache_dtype": ("auto", *KV_DTYPES),
    "mamba_cache_dtype": ("auto", "float16", "bfloat16", "float32"),
    "mamba_ssm_cache_dtype": ("auto", "float16", "bfloat16", "float32"),
    "mm_processor_cache_type": ("lru", "shm"),
    "mm_encoder_tp_mode": ("weights", "data"),
}
"""The values of options that are words (vLLM's `config/`)."""


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
    allow_long_max_model_len: bool = False
    """vLLM's VLLM_ALLOW_LONG_MAX_MODEL_LEN: lengths that the config does not allow."""
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Values for keys of config.json."""
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
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    decode_context_parallel_size: int = 1
    quantization: str | None = None
    """A scheme that the engine applies while it loads (`fp8`), or one of `tightfit quantize`."""
    quantization_group_size: int | None = None
    quantization_format: str | None = None
    """Of what `tightfit quantize` would write."""
    quantization_recipe: "Wish | None" = None
    """What it would make of the model, where that is more than a scheme."""
    load_format: str = "auto"
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool | None = None
    async_scheduling: bool | None = None
    disable_hybrid_kv_cache_manager: bool = False
    num_gpu_blocks_override: int | None = None
    mamba_cache_dtype: str = "auto"
    mamba_ssm_cache_dtype: str = "auto"
    compilation_config: Mapping[str, Any] = field(default_factory=dict)
    optimization_level: int | None = None
    limit_mm_per_prompt: Mapping[str, Any] = field(default_factory=dict)
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    mm_processor_cache_gb: float | None = None
    mm_processor_cache_type: str = "lru"
    mm_encoder_tp_mode: str = "weights"
    skip_mm_profiling: bool = False
    language_model_only: bool = False
    cpu_offload_gb: float = 0.0
    kv_offloading_size: float | None = None
    """GiB of host memory for evicted KV blocks, over all ranks."""
    cpu_kvcache_space: float | None = None
    """GiB: vLLM's VLLM_CPU_KVCACHE_SPACE, for its CPU backend."""
    api_server_count: int | None = None
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None
    model_impl: str = "auto"
    """Whose code the builtin runtime executes: its own (`builtin`), or that of `transformers`."""
    assume_full_attention: bool = False
    """Plan layers of an unknown kind as full attention instead of refusing."""
    use_flashinfer_sampler: bool | None = None
    """vLLM's VLLM_USE_FLASHINFER_SAMPLER; None is the version's own choice."""
    warm_compile_cache: bool = False
    """vLLM has compiled this model before, and times no kernels again."""
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
            ("data_parallel_size", 1),
            ("decode_context_parallel_size", 1),
            ("num_gpu_blocks_override", 1),
            ("api_server_count", 1),
            ("max_loras", 1),
            ("max_lora_rank", 1),
            ("max_cpu_loras", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("block_size", 1),
            ("max_cudagraph_capture_size", 1),
            ("kv_cache_memory_bytes", 0),
            ("optimization_level", 0),
            ("mm_processor_cache_gb", 0),
            ("cpu_offload_gb", 0),
            ("kv_offloading_size", 0),
            ("cpu_kvcache_space", 0),
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
        if self.optimization_level is not None and self.optimization_level > 3:
            raise UsageError(f"-O {self.optimization_level} is out of range", hint="0 to 3")
        for name, known in _WORDS.items():
            word = getattr(self, name)
            if name == "kv_cache_dtype" and word in _UNMODELLED_KV_DTYPES.split():
                raise UnsupportedModelError(
                    f"--kv-cache-dtype {word}, which vLLM has, is not modelled",
                    hint="modelled: " + ", ".join(one for one in known if one != "float32"),
                )
            if word not in known:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"unknown {option} {word!r}", hint=", ".join(known))


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
    cudagraph_mode: Option[str] | None = None
    quantization: Option[str | None] | None = None
    data_parallel_size: Option[int] | None = None
    enable_expert_parallel: Option[bool] | None = None
    enable_prefix_caching: Option[bool] | None = None
    async_scheduling: Option[bool] | None = None
    asked: PlanOptions = field(default_factory=PlanOptions)
    """What the user gave, for options that have no default to resolve."""

    @property
    def pool_is_given(self) -> bool:
        """Whether the user said how large the pool is, whatever the budget leaves."""
        blocks = self.asked.num_gpu_blocks_override
        return self.kv_cache_memory_bytes.value is not None or blocks is not None

    def to_json(self) -> dict[str, Any]:
        """The options in schema 1."""
        return {
            one.name: {"value": option.value, "origin": option.origin}
            for one in fields(self)
            if isinstance(option := getattr(self, one.name), Option)
        }


def pick(given: T | None, default: T, origin: str = "engine default") -> Option[T]:
    """The user's value, or a default with its origin."""
    if given is not None:
        return Option(value=given, origin="flag")
    return Option(value=default, origin=origin)


def flag(given: T) -> Option[T]:
    """A value that always comes from the command line, such as a parallel size."""
    return Option(value=given, origin="flag")
