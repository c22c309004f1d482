"""vLLM's start-up budget: what it grants the KV cache, in its own words.

Sources, all relative to the vLLM 0.32 package: `config/cache.py` (utilization),
`engine/arg_utils.py: get_batch_defaults` (batch sizes), `v1/core/kv_cache_utils.py` (blocks, checks
and messages), `config/vllm.py: max_in_flight_tokens`.
"""

from math import ceil

from tightfit.errors import UsageError
from tightfit.model.layout import Parallel, Rank
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import Device
from tightfit.planner.engines.base import Engine
from tightfit.planner.kv_cache import KVLayout, kv_layout, layer_kinds
from tightfit.planner.options import (
    PlanOptions,
    Resolved,
    flag,
    pick,
    resolve_dtype,
    resolve_kv_dtype,
    resolve_max_model_len,
)
from tightfit.planner.plan import Component
from tightfit.units import GiB, dtype_bytes

VERSION = "0.32.0"


class VLLM(Engine):
    """vLLM 0.32 with the V2 model runner on a CUDA device."""

    name = "vllm"
    version = VERSION
    held_back_blocks = 1  # block 0 is the null block
    out_of_memory = "torch.OutOfMemoryError: CUDA out of memory."
    not_modelled = (
        "activations",
        "logits_and_sampler",
        "persistent_buffers",
        "moe_workspace",
        "cuda_graphs",
        "non_torch",
        "cuda_context",
        "nccl",
        "host memory",
    )

    def parallel(self, options: PlanOptions) -> Parallel:
        """Even shares only, as vLLM demands."""
        return Parallel(
            tensor_parallel_size=options.tensor_parallel_size,
            pipeline_parallel_size=options.pipeline_parallel_size,
        )

    def resolve(self, spec: ModelSpec, options: PlanOptions) -> Resolved:
        """Defaults as `EngineArgs` fills them in.

        Raises:
            UsageError: an unknown version, or batch sizes that contradict each other.
        """
        if options.engine_version not in (None, VERSION):
            raise UsageError(
                f"vLLM {options.engine_version} is not modelled", hint=f"modelled: {VERSION}"
            )
        dtype = resolve_dtype(spec, options)
        length = resolve_max_model_len(spec, options)
        batched, seqs = _batch_defaults(options.device, options.entrypoint)
        max_num_seqs = pick(options.max_num_seqs, seqs)
        tokens = pick(
            options.max_num_batched_tokens, min(batched, max_num_seqs.value * length.value)
        )
        if options.max_num_seqs is None:
            max_num_seqs = pick(None, min(seqs, tokens.value))
        if tokens.value < max_num_seqs.value:
            raise UsageError(
                f"--max-num-batched-tokens {tokens.value} is less than --max-num-seqs "
                f"{max_num_seqs.value}",
                hint="vLLM needs at least one token per sequence",
            )
        return Resolved(
            dtype=dtype,
            kv_cache_dtype=resolve_kv_dtype(options, dtype.value),
            max_model_len=length,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=tokens,
            gpu_memory_utilization=pick(options.gpu_memory_utilization, 0.92),
            kv_cache_memory_bytes=pick(options.kv_cache_memory_bytes, None),
            block_size=pick(options.block_size, 16),
            tensor_parallel_size=flag(options.tensor_parallel_size),
            pipeline_parallel_size=flag(options.pipeline_parallel_size),
        )

    def components(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> tuple[Component, ...]:
        """None yet: see `not_modelled`."""
        return ()

    def kv_layout(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> KVLayout:
        """Hybrid groups; with asynchronous scheduling pp+1 steps are in flight."""
        kinds = layer_kinds(spec, rank, dtype_bytes(resolved.kv_cache_dtype.value))
        steps = rank.parallel.pipeline_parallel_size + 1
        return kv_layout(
            kinds,
            block_size=resolved.block_size.value,
            in_flight_tokens=steps * resolved.max_num_batched_tokens.value,
        )

    def budget_bytes(self, device: Device, parallel: Parallel, resolved: Resolved) -> int:
        """`v1/worker/utils.py: request_memory`."""
        return ceil(device.total_bytes * resolved.gpu_memory_utilization.value)

    def refusal(self, needed_bytes: int, available_bytes: int, longest: int, length: int) -> str:
        """`v1/core/kv_cache_utils.py: _check_enough_kv_cache_memory`, word for word."""
        if available_bytes <= 0:
            return (
                "No available memory for the cache blocks. Try increasing "
                "`gpu_memory_utilization` when initializing the engine (this flag also controls "
                f"CPU memory reservation on the CPU backend, despite its name). {_SEE_DOCS}"
            )
        estimate = (
            f"Based on the available memory, the estimated maximum model length is {longest}. "
            if longest
            else ""
        )
        return (
            f"To serve at least one request with the model's max seq len ({length}), "
            f"({round(needed_bytes / GiB, 2)} GiB KV cache is needed, which is larger than the "
            f"available KV cache memory ({round(available_bytes / GiB, 2)} GiB). {estimate}"
            "Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU "
            f"backend) or decreasing `max_model_len` when initializing the engine. {_SEE_DOCS}"
        )


_SEE_DOCS = "See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."


def _batch_defaults(device: Device | None, entrypoint: str) -> tuple[int, int]:
    """`max_num_batched_tokens` and `max_num_seqs` by device and entry point."""
    server = entrypoint == "server"
    total_bytes = device.total_bytes if device else 80 * GiB
    if total_bytes >= 160 * GiB:
        return 16384, 1024
    if total_bytes >= 70 * GiB and not (device and device.name.startswith("a100")):
        return (8192 if server else 16384), 1024
    return (2048 if server else 8192), 256
