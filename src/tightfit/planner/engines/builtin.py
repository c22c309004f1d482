"""tightfit's own runtime: an engine whose formulas we own, so that `run` can prove the plan.

On a CPU all ranks share the memory of one machine, and the pool is no larger than what
`max_num_seqs` sequences of `max_model_len` tokens need. On a GPU it takes what the budget leaves.
"""

from collections import Counter
from dataclasses import replace
from math import ceil

from tightfit import __version__
from tightfit.errors import UsageError
from tightfit.model.aliases import require_own_names
from tightfit.model.layout import Parallel, Rank
from tightfit.model.quantization.recipe import Recipe
from tightfit.model.quantization.schemes import FP8
from tightfit.model.spec import ModelSpec
from tightfit.model.stored.quantized import in_blocks
from tightfit.planner.devices import Device
from tightfit.planner.engines.base import Engine
from tightfit.planner.engines.builtin_cuda import LARGEST_GRAPH, gpu_components
from tightfit.planner.engines.builtin_memory import step_components
from tightfit.planner.engines.builtin_transformers import (
    by_transformers,
    offloaded_layers,
    transformers_components,
)
from tightfit.planner.engines.vllm_captures import capture_sizes
from tightfit.planner.kv_cache import KVLayout, kv_layout
from tightfit.planner.kv_kinds import CacheDtypes, layer_kinds
from tightfit.planner.options import KV_DTYPES, Option, PlanOptions, Resolved, flag, pick
from tightfit.planner.plan import Component
from tightfit.planner.resolve import (
    model_max_len,
    resolve_block_size,
    resolve_dtype,
    resolve_kv_dtype,
    resolve_max_model_len,
)
from tightfit.units import GiB

_LEAST_CAPABILITY = (8, 0)
"""Triton supports GPUs from here on (its README)."""
_FP8_CAPABILITY = (8, 9)
"""Triton converts e4m3 from here on."""


class Builtin(Engine):
    """The runtime of this version of tightfit."""

    name = "builtin"
    version = __version__

    def __init__(self, device: Device | None, *, tokenizer_json_bytes: int = 0) -> None:
        self._device = device
        self.kind = "cuda" if device is None else device.kind
        self._capability = None if device is None else device.capability
        self.tokenizer_json_bytes = tokenizer_json_bytes
        self.models_driver = self.kind == "cuda"
        self.not_modelled = () if self.kind == "cpu" else ("memory of the host",)

    def parallel(self, options: PlanOptions) -> Parallel:
        """Heads need not divide: ranks may have uneven shares."""
        return Parallel(
            tensor_parallel_size=options.tensor_parallel_size,
            pipeline_parallel_size=options.pipeline_parallel_size,
            uneven=True,
        )

    def adapt(self, spec: ModelSpec, options: PlanOptions) -> ModelSpec:
        """Without the zeros that vLLM's kernels want beside gpt-oss's experts."""
        del options
        recipe = spec.quantization
        if not isinstance(recipe, Recipe) or not recipe.padded_experts:
            return spec
        return replace(spec, quantization=in_blocks(recipe))

    def resolve(self, spec: ModelSpec, options: PlanOptions) -> Resolved:
        """Defaults that suit a demonstration on a CPU, and serving on a GPU.

        Raises:
            UnsupportedModelError: neither the runtime's own code nor transformers' can run it.
            UsageError: an option that the runtime has not, or a GPU that it does not run on.
        """
        require_own_names(spec)
        self._require_device()
        others = by_transformers(spec, options.model_impl)
        if others and max(options.tensor_parallel_size, options.pipeline_parallel_size) > 1:
            raise UsageError(
                f"{spec.architecture} runs by transformers' code, and that on one rank only",
                hint="leave out parallel sizes, or use --engine vllm",
            )
        if options.cpu_offload_gb and (self.kind == "cpu" or not others):
            raise UsageError(
                "--cpu-offload-gb needs a GPU, and --model-impl transformers in this runtime",
                hint="leave it out, or plan with --engine vllm",
            )
        cpu = self.kind == "cpu"
        dtype = resolve_dtype(spec, options, self._device)
        usual = max(512 if cpu else 8192, options.max_num_seqs or 0)
        tokens = pick(options.max_num_batched_tokens, usual)
        seqs = pick(options.max_num_seqs, min(8 if cpu else 256, tokens.value))
        if tokens.value < seqs.value:
            raise UsageError(
                f"--max-num-batched-tokens {tokens.value} is less than --max-num-seqs {seqs.value}",
                hint="every running sequence needs one token per step: raise the former, or lower "
                "the latter",
            )
        return Resolved(
            dtype=dtype,
            kv_cache_dtype=self._kv_cache_dtype(spec, options, dtype.value),
            max_model_len=_max_model_len(spec, options, cpu=cpu),
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            gpu_memory_utilization=pick(options.gpu_memory_utilization, 0.9),
            kv_cache_memory_bytes=pick(options.kv_cache_memory_bytes, None),
            block_size=resolve_block_size(options, 16, self._device),
            tensor_parallel_size=flag(options.tensor_parallel_size),
            pipeline_parallel_size=flag(options.pipeline_parallel_size),
            enforce_eager=None if cpu else pick(options.enforce_eager or None, False),
            cudagraph_capture_sizes=None if cpu else _capture_sizes(options, seqs.value, others),
            asked=options,
        )

    def _require_device(self) -> None:
        if self._device is None or self.kind == "cpu":
            return
        old = self._capability is not None and self._capability < _LEAST_CAPABILITY
        if self.kind != "cuda" or old:
            raise UsageError(
                f"the builtin runtime does not run on {self._device.name}",
                hint="its kernels are for NVIDIA's GPUs from A100 on; use --engine vllm",
            )

    def offloaded_bytes(self, spec: ModelSpec, rank: Rank, options: PlanOptions, dtype: str) -> int:
        """Whole layers, the last first."""
        del rank
        return offloaded_layers(spec, dtype, int(options.cpu_offload_gb * GiB))[1]

    def components(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> tuple[Component, ...]:
        """Buffers, the peak of a step, and the process or the device's context."""
        if by_transformers(spec, resolved.asked.model_impl):
            return transformers_components(
                spec,
                resolved,
                device=self.kind,
                tokenizer_json_bytes=self.tokenizer_json_bytes,
            )
        if self.kind != "cpu":
            return gpu_components(spec, rank, resolved)
        return step_components(
            spec,
            rank,
            dtype=resolved.dtype.value,
            max_model_len=resolved.max_model_len.value,
            max_num_seqs=resolved.max_num_seqs.value,
            max_num_batched_tokens=resolved.max_num_batched_tokens.value,
            block_size=resolved.block_size.value,
            kv_cache_dtype=resolved.kv_cache_dtype.value,
            tokenizer_json_bytes=self.tokenizer_json_bytes,
        )

    def _kv_cache_dtype(self, spec: ModelSpec, options: PlanOptions, dtype: str) -> Option[str]:
        """That of computation, or float8_e4m3fn.

        Raises:
            UsageError: another one, or one that the GPU does not convert.
        """
        found = resolve_kv_dtype(spec, options, dtype)
        if found.value == dtype:
            return found
        asked = f"--kv-cache-dtype {options.kv_cache_dtype}"
        if found.origin == "config":
            asked = f"the checkpoint asks for a KV cache in {spec.kv_cache_quantization}"
        own = next(word for word, stored in KV_DTYPES.items() if stored == dtype)
        if found.value != FP8:
            raise UsageError(
                f"{asked}: the builtin runtime stores keys and values in {own}, in which it "
                "computes, or in fp8_e4m3",
                hint=f"use --kv-cache-dtype {own} or fp8, or --engine vllm",
            )
        if self._capability is not None and self._capability < _FP8_CAPABILITY:
            capability = ".".join(map(str, self._capability))
            raise UsageError(
                f"{asked}: the builtin runtime's kernels need compute capability 8.9 for fp8, and "
                f"the GPU has {capability}",
                hint=f"use --kv-cache-dtype {own}, or --engine vllm",
            )
        return found

    def kv_layout(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> KVLayout:
        """Layers that attend keep every token, windows or not; states are among the buffers."""
        kinds = layer_kinds(
            spec, rank, CacheDtypes.of(resolved.kv_cache_dtype.value), windows=False
        )
        kinds = Counter({kind: count for kind, count in kinds.items() if not kind.is_state})
        return kv_layout(kinds, block_size=resolved.block_size.value)

    def budget_bytes(self, device: Device, parallel: Parallel, resolved: Resolved) -> int:
        """The ranks of a CPU share one machine."""
        usable = ceil(device.total_bytes * resolved.gpu_memory_utilization.value)
        return usable // parallel.world_size if device.kind == "cpu" else usable

    def pool_blocks(self, available_blocks: int, layout: KVLayout, resolved: Resolved) -> int:
        """On a CPU not more than `max_num_seqs` full sequences can use."""
        if self.kind != "cpu" or resolved.kv_cache_memory_bytes.value is not None:
            return available_blocks
        sequence = layout.blocks(resolved.max_model_len.value)
        return min(available_blocks, resolved.max_num_seqs.value * sequence)


CPU_MAX_MODEL_LEN = 4096
"""What a demonstration on a CPU needs, unless more is asked for."""


def _max_model_len(spec: ModelSpec, options: PlanOptions, *, cpu: bool) -> Option[int]:
    length = resolve_max_model_len(spec, options, model_max_len(spec), usual=spec.original_length)
    if not cpu or options.max_model_len is not None:
        return length
    return Option(value=min(length.value, CPU_MAX_MODEL_LEN), origin="engine default")


def _capture_sizes(
    options: PlanOptions, max_num_seqs: int, others: bool
) -> Option[tuple[int, ...]]:
    """Numbers of decoding sequences, in vLLM's steps; none is larger than can run.

    Code of `others`, which may look at a tensor's values, is not recorded.
    """
    if others:
        return Option(value=(), origin="engine default")
    given, maximum = options.cudagraph_capture_sizes, options.max_cudagraph_capture_size
    if options.enforce_eager:
        return Option(value=(), origin="flag")
    sizes = capture_sizes(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs,
        given=given,
        maximum=None if given else min(maximum or LARGEST_GRAPH, max_num_seqs),
    )
    asked = given is not None or maximum is not None
    return Option(value=sizes, origin="flag" if asked else "engine default")
