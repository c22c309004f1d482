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
from tightfit.planner.engines.vllm_graphs import capture_sizes
from tightfit.planner.engines.vllm_memory import components
from tightfit.planner.engines.vllm_setting import Setting
from tightfit.planner.engines.vllm_versions import Rules, default_runner, rules_of
from tightfit.planner.kv_cache import KVLayout, kv_layout, layer_kinds
from tightfit.planner.options import Option, PlanOptions, Resolved, flag, pick
from tightfit.planner.plan import Component
from tightfit.planner.resolve import resolve_dtype, resolve_kv_dtype, resolve_max_model_len
from tightfit.units import GiB, dtype_bytes


class VLLM(Engine):
    """vLLM on a CUDA device, in one of the versions that `vllm_versions` knows."""

    name = "vllm"
    models_driver = True
    out_of_memory = "torch.OutOfMemoryError: CUDA out of memory."
    not_modelled = (
        "host memory",
        "start-up with a warm compile cache",
        "speculative decoding, LoRA, offloading, data and expert parallelism",
    )

    def __init__(self, device: Device | None = None, version: str | None = None) -> None:
        self.device = device
        self.rules = rules_of(version)
        self.version = self.rules.version
        self.held_back_blocks = self.rules.null_block

    def parallel(self, options: PlanOptions) -> Parallel:
        """Even shares only, as vLLM demands."""
        return Parallel(
            tensor_parallel_size=options.tensor_parallel_size,
            pipeline_parallel_size=options.pipeline_parallel_size,
        )

    def resolve(self, spec: ModelSpec, options: PlanOptions) -> Resolved:
        """Defaults as `EngineArgs` fills them in.

        Raises:
            UsageError: batch or capture sizes that contradict each other.
        """
        dtype = resolve_dtype(spec, options)
        length = resolve_max_model_len(spec, options)
        batched, seqs = _batch_defaults(self.rules, options.device, options.entrypoint)
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
            enforce_eager=pick(options.enforce_eager or None, False),
            cudagraph_capture_sizes=self._captures(options, max_num_seqs.value, tokens.value),
            model_runner=self._runner(spec, options),
        )

    def _captures(self, options: PlanOptions, seqs: int, tokens: int) -> Option[tuple[int, ...]]:
        given, maximum = options.cudagraph_capture_sizes, options.max_cudagraph_capture_size
        asked = given is not None or maximum is not None or options.enforce_eager
        blackwell = self.device is not None and self.device.name.startswith("b200")
        newest = self.rules.v2_measures_graphs
        sizes = capture_sizes(
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            given=given,
            maximum=maximum,
            limit=1024 if blackwell and newest else 512,
            with_limits=newest,
        )
        return Option(
            value=() if options.enforce_eager else sizes,
            origin="flag" if asked else "engine default",
        )

    def _runner(self, spec: ModelSpec, options: PlanOptions) -> Option[str]:
        asked = options.use_v2_model_runner
        given = None if asked is None else "v2" if asked else "v1"
        return pick(given, default_runner(self.rules, spec))

    def components(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> tuple[Component, ...]:
        """See `vllm_memory`."""
        eager, sizes = resolved.enforce_eager, resolved.cudagraph_capture_sizes
        runner = resolved.model_runner
        assert eager is not None
        assert sizes is not None
        assert runner is not None
        return components(
            Setting(
                spec=spec,
                rank=rank,
                rules=self.rules,
                device=self.device,
                runner=runner.value,
                eager=eager.value,
                capture_sizes=sizes.value,
                element_bytes=dtype_bytes(resolved.dtype.value),
                max_num_batched_tokens=resolved.max_num_batched_tokens.value,
                max_num_seqs=resolved.max_num_seqs.value,
                max_model_len=resolved.max_model_len.value,
                block_size=resolved.block_size.value,
                kv_groups=len(self.kv_layout(spec, rank, resolved).groups),
            )
        )

    def kv_layout(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> KVLayout:
        """Hybrid groups; with asynchronous scheduling pp+1 steps are in flight."""
        kinds = layer_kinds(spec, rank, dtype_bytes(resolved.kv_cache_dtype.value))
        steps = rank.parallel.pipeline_parallel_size + 1 if self.rules.steps_in_flight else 1
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


def _batch_defaults(rules: Rules, device: Device | None, entrypoint: str) -> tuple[int, int]:
    """`max_num_batched_tokens` and `max_num_seqs` by device and entry point."""
    server = entrypoint == "server"
    total_bytes = device.total_bytes if device else 80 * GiB
    if total_bytes >= 160 * GiB:
        return (rules.large_server_tokens if server else 16384), 1024
    if total_bytes >= 70 * GiB and not (device and device.name.startswith("a100")):
        return (8192 if server else 16384), 1024
    return (2048 if server else 8192), 256
