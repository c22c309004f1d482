"""tightfit's own runtime: an engine whose formulas we own, so that `run` can prove the plan.

On a CPU all ranks share the memory of one machine, and the pool is no larger than what
`max_num_seqs` sequences of `max_model_len` tokens need. On a GPU it takes what the budget leaves.
"""

from math import ceil

from tightfit import __version__
from tightfit.errors import UnsupportedModelError, UsageError
from tightfit.model.aliases import require_own_names
from tightfit.model.layout import Parallel, Rank
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import Device
from tightfit.planner.engines.base import Engine
from tightfit.planner.engines.builtin_memory import step_components
from tightfit.planner.kv_cache import CacheDtypes, KVLayout, kv_layout, layer_kinds
from tightfit.planner.options import Option, PlanOptions, Resolved, flag, pick
from tightfit.planner.plan import Component
from tightfit.planner.resolve import resolve_dtype, resolve_max_model_len


class Builtin(Engine):
    """The runtime of this version of tightfit."""

    name = "builtin"
    version = __version__

    def __init__(self, device: Device | None, *, tokenizer_json_bytes: int = 0) -> None:
        self.kind = "cuda" if device is None else device.kind
        self.tokenizer_json_bytes = tokenizer_json_bytes
        self.not_modelled = () if self.kind == "cpu" else ("cuda_graphs", "cuda_context", "nccl")

    def parallel(self, options: PlanOptions) -> Parallel:
        """Heads need not divide: ranks may have uneven shares.

        Raises:
            UsageError: pipeline parallelism, which the runtime has not.
        """
        if options.pipeline_parallel_size > 1:
            raise UsageError(
                f"--pipeline-parallel-size {options.pipeline_parallel_size}: the builtin runtime "
                "has tensor parallelism only",
                hint="use --tensor-parallel-size, or --engine vllm",
            )
        return Parallel(tensor_parallel_size=options.tensor_parallel_size, uneven=True)

    def resolve(self, spec: ModelSpec, options: PlanOptions) -> Resolved:
        """Defaults that suit a demonstration on a CPU, and serving on a GPU.

        Raises:
            UnsupportedModelError: the checkpoint is quantized.
            UsageError: an option that the runtime has not.
        """
        require_own_names(spec)
        if not spec.is_plain:
            raise UnsupportedModelError(
                f"the builtin runtime cannot execute {spec.architecture}",
                hint="serve it with vLLM, and plan it with --engine vllm",
            )
        if options.kv_cache_dtype != "auto":
            raise UsageError(
                f"--kv-cache-dtype {options.kv_cache_dtype}: the builtin runtime stores keys and "
                "values in the dtype of computation",
                hint="use --dtype, or --engine vllm",
            )
        cpu = self.kind == "cpu"
        dtype = resolve_dtype(spec, options)
        return Resolved(
            dtype=dtype,
            kv_cache_dtype=dtype,
            max_model_len=_max_model_len(spec, options, cpu=cpu),
            max_num_seqs=pick(options.max_num_seqs, 8 if cpu else 256),
            max_num_batched_tokens=pick(options.max_num_batched_tokens, 512 if cpu else 8192),
            gpu_memory_utilization=pick(options.gpu_memory_utilization, 0.9),
            kv_cache_memory_bytes=pick(options.kv_cache_memory_bytes, None),
            block_size=pick(options.block_size, 16),
            tensor_parallel_size=flag(options.tensor_parallel_size),
            pipeline_parallel_size=flag(options.pipeline_parallel_size),
        )

    def components(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> tuple[Component, ...]:
        """Buffers, the peak of a step, and on a CPU the process itself."""
        return step_components(
            spec,
            rank,
            dtype=resolved.dtype.value,
            max_model_len=resolved.max_model_len.value,
            max_num_seqs=resolved.max_num_seqs.value,
            max_num_batched_tokens=resolved.max_num_batched_tokens.value,
            block_size=resolved.block_size.value,
            device=self.kind,
            tokenizer_json_bytes=self.tokenizer_json_bytes,
        )

    def kv_layout(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> KVLayout:
        """Every layer keeps every token, windows or not."""
        kinds = layer_kinds(
            spec, rank, CacheDtypes.of(resolved.kv_cache_dtype.value), windows=False
        )
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
    length = resolve_max_model_len(spec, options)
    if not cpu or options.max_model_len is not None:
        return length
    return Option(value=min(length.value, CPU_MAX_MODEL_LEN), origin="engine default")
