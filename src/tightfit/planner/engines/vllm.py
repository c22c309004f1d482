"""vLLM's start-up budget: what it grants the KV cache, in its own words.

Sources, all relative to the vLLM 0.32 package: `config/cache.py` (utilization),
`engine/arg_utils.py: get_batch_defaults` (batch sizes), `v1/core/kv_cache_utils.py` (checks and
messages).
"""

from collections.abc import Sequence
from math import ceil

from tightfit.errors import UnsupportedModelError, UsageError
from tightfit.model.layout import Parallel, Rank
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import Device
from tightfit.planner.engines.base import Deployed, Engine
from tightfit.planner.engines.vllm_captures import captured_sizes, cudagraph_mode
from tightfit.planner.engines.vllm_checks import check_device, check_options
from tightfit.planner.engines.vllm_kv import layout, packed_latents, usual_block
from tightfit.planner.engines.vllm_memory import components
from tightfit.planner.engines.vllm_setting import Setting
from tightfit.planner.engines.vllm_versions import (
    MEASURED_VERSION,
    Rules,
    default_runner,
    is_newer,
    rules_of,
)
from tightfit.planner.kv_cache import KVLayout
from tightfit.planner.options import Option, PlanOptions, Resolved, flag, pick
from tightfit.planner.plan import Component
from tightfit.planner.quantized import wish_of
from tightfit.planner.resolve import (
    model_max_len,
    resolve_block_size,
    resolve_dtype,
    resolve_kv_dtype,
    resolve_max_model_len,
)
from tightfit.planner.weights import offloadable
from tightfit.units import GiB, dtype_bytes


class VLLM(Engine):
    """vLLM on a CUDA device, in one of the versions that `vllm_versions` knows."""

    name = "vllm"
    models_driver = True
    out_of_memory = "torch.OutOfMemoryError: CUDA out of memory."
    not_modelled: tuple[str, ...] = (
        "speculative decoding",
        "other processes on the device",
    )

    def __init__(self, device: Device | None = None, version: str | None = None) -> None:
        self.device = device
        self.rules = rules_of(version)
        self.version = version or self.rules.version
        self.held_back_blocks = self.rules.null_block
        if self.rules.version != MEASURED_VERSION:
            own = f"how kernels and graphs differ from {MEASURED_VERSION}, where they were measured"
            self.not_modelled = (*self.not_modelled, own)
        if is_newer(self.version):
            known = self.rules.version
            self.warnings = (f"vLLM {self.version} is newer than {known}, whose rules were used",)

    def parallel(self, options: PlanOptions) -> Parallel:
        """Even shares only, as vLLM demands.

        Raises:
            UsageError: context parallel ranks that tensor parallel ones cannot be shared among.
        """
        tp, dcp = options.tensor_parallel_size, options.decode_context_parallel_size
        if tp % dcp:
            raise UsageError(
                f"--decode-context-parallel-size {dcp} does not divide --tensor-parallel-size {tp}",
                hint="the ranks of a layer share the context",
            )
        return Parallel(
            tensor_parallel_size=options.tensor_parallel_size,
            pipeline_parallel_size=options.pipeline_parallel_size,
            data_parallel_size=options.data_parallel_size,
            expert_parallel=options.enable_expert_parallel,
        )

    def longest(self, spec: ModelSpec) -> int:
        """`config/model.py: _get_and_verify_max_len`."""
        return model_max_len(spec, scales_yarn=self.rules.scales_yarn)

    def adapt(self, spec: ModelSpec, options: PlanOptions) -> ModelSpec:
        """Without the towers that the limits switch off, and quantized while it is loaded.

        Raises:
            UsageError: malformed limits, or a quantization that the checkpoint does not allow.
            UnsupportedModelError: a quantization that this version does not load.
        """
        if spec.towers:
            from tightfit.planner.engines.vllm_media import built

            spec = built(spec, options)
        if options.quantization is not None and wish_of(options) is None:
            from tightfit.model.quantization.online import quantize_spec

            spec = quantize_spec(spec, options.quantization)
        if spec.quantization is not None and self.rules.fits_quantization:
            from tightfit.model.quantization.fit import fit_quantization

            spec = fit_quantization(spec, self.parallel(options))
        if spec.quantization is not None and self.rules.cuts_fused_blocks:
            from tightfit.model.quantization.fit import cut_fused

            spec = cut_fused(spec)
        refusal = spec.quantization.refusal(self.rules.minor) if spec.quantization else None
        if refusal:
            raise UnsupportedModelError(refusal, hint="name your version with --engine-version")
        return spec

    def offloaded_bytes(self, spec: ModelSpec, rank: Rank, options: PlanOptions, dtype: str) -> int:
        """`model_executor/offloader/uva.py`: parameters in order, until they reach the limit."""
        if self._runner(spec, options).value == "v2" and not self.rules.v2_offloads:
            return 0
        return offloadable(spec, rank, dtype, int(options.cpu_offload_gb * GiB))

    def resolve(self, spec: ModelSpec, options: PlanOptions) -> Resolved:
        """Defaults as `EngineArgs` fills them in.

        Raises:
            UsageError: batch or capture sizes that contradict each other.
        """
        dtype = resolve_dtype(spec, options, self.device)
        usual = spec.original_length if self.rules.short_longrope else None
        length = resolve_max_model_len(spec, options, self.longest(spec), usual)
        tokens, max_num_seqs = self._batch(spec, options, length.value)
        mode = cudagraph_mode(spec, options, self.rules)
        captures = captured_sizes(
            spec,
            options,
            self.rules,
            max_num_seqs=max_num_seqs.value,
            max_num_batched_tokens=tokens.value,
            limit=1024 if self._is_blackwell and self.rules.large_captures else 512,
        )
        if mode.value == "NONE":
            captures = Option(value=(), origin=mode.origin)
        kv_dtype = resolve_kv_dtype(spec, options, dtype.value)
        return Resolved(
            dtype=dtype,
            kv_cache_dtype=packed_latents(
                spec, kv_dtype, options.kv_cache_dtype, self.device, self.rules
            ),
            max_model_len=length,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=tokens,
            gpu_memory_utilization=pick(options.gpu_memory_utilization, self.rules.utilization),
            kv_cache_memory_bytes=pick(options.kv_cache_memory_bytes, None),
            block_size=resolve_block_size(
                options,
                usual_block(spec, kv_dtype.value, self.device, self.rules),
                self.device,
            ),
            tensor_parallel_size=flag(options.tensor_parallel_size),
            pipeline_parallel_size=flag(options.pipeline_parallel_size),
            data_parallel_size=pick(_unless(options.data_parallel_size, 1), 1),
            enable_expert_parallel=pick(options.enable_expert_parallel or None, False),
            enforce_eager=pick(options.enforce_eager or None, False),
            cudagraph_mode=mode,
            cudagraph_capture_sizes=captures,
            model_runner=self._runner(spec, options),
            quantization=_quantization(spec, options),
            enable_prefix_caching=pick(
                options.enable_prefix_caching,
                self.rules.hybrid_prefix_caching or not spec.is_recurrent,
            ),
            async_scheduling=pick(options.async_scheduling, self.rules.async_scheduling),
            asked=options,
        )

    def check(self, spec: ModelSpec, resolved: Resolved) -> None:
        """See `vllm_checks`."""
        check_device(spec, self.device, self.rules)
        check_options(spec, resolved, self.rules)

    @property
    def _is_blackwell(self) -> bool:
        capability = None if self.device is None else self.device.capability
        return capability is not None and capability[0] == 10

    def _batch(
        self, spec: ModelSpec, options: PlanOptions, length: int
    ) -> tuple[Option[int], Option[int]]:
        """`max_num_batched_tokens` and `max_num_seqs`, of which each may bound the other."""
        batched, seqs = _batch_defaults(self.rules, options.device, options.entrypoint)
        max_num_seqs = pick(options.max_num_seqs, seqs)
        default = self.default_tokens(spec, options, length, batched, max_num_seqs.value)
        tokens = pick(options.max_num_batched_tokens, default)
        if options.max_num_seqs is None:
            max_num_seqs = pick(None, min(seqs, tokens.value))
        if tokens.value < max_num_seqs.value:
            raise UsageError(
                f"--max-num-batched-tokens {tokens.value} is less than --max-num-seqs "
                f"{max_num_seqs.value}",
                hint="vLLM needs at least one token per sequence",
            )
        return tokens, max_num_seqs

    def default_tokens(
        self, spec: ModelSpec, options: PlanOptions, length: int, usual: int, seqs: int
    ) -> int:
        """`_set_default_max_num_seqs_and_batched_tokens_args`, from what is usual on the device."""
        if options.enable_chunked_prefill is False:
            usual = max(usual, length)
        if any(tower.whole_items for tower in spec.towers):
            from tightfit.planner.engines.vllm_media import least_step

            usual = max(usual, least_step(spec, options, length))
        return min(usual, seqs * length)

    def _runner(self, spec: ModelSpec, options: PlanOptions) -> Option[str]:
        asked = options.use_v2_model_runner
        given = None if asked is None else "v2" if asked else "v1"
        return pick(given, default_runner(self.rules, spec))

    def components(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> tuple[Component, ...]:
        """See `vllm_memory`."""
        return components(self.setting(spec, rank, resolved))

    def setting(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> Setting:
        """The quantities of the formulas."""
        sizes, runner, mode = (
            resolved.cudagraph_capture_sizes,
            resolved.model_runner,
            resolved.cudagraph_mode,
        )
        assert sizes is not None
        assert runner is not None
        assert mode is not None
        options = resolved.asked
        eager = options.enforce_eager or options.optimization_level == 0
        return Setting(
            spec=spec,
            rank=rank,
            rules=self.rules,
            device=self.device,
            options=options,
            runner=runner.value,
            eager=eager or options.compilation_config.get("mode") == 0,
            cudagraph_mode=mode.value,
            capture_sizes=sizes.value,
            element_bytes=dtype_bytes(resolved.dtype.value),
            max_num_batched_tokens=resolved.max_num_batched_tokens.value,
            max_num_seqs=resolved.max_num_seqs.value,
            max_model_len=resolved.max_model_len.value,
            kv=self.kv_layout(spec, rank, resolved),
        )

    def host(
        self, spec: ModelSpec, resolved: Resolved, deployed: Deployed
    ) -> tuple[Component, ...]:
        """See `planner.host`."""
        from tightfit.planner.host import host_components

        asked = resolved.asked
        return host_components(spec, self.parallel(asked), asked, resolved, deployed)

    def kv_layout(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> KVLayout:
        """See `vllm_kv`.

        Raises:
            UsageError: context parallelism, and layers with a window.
        """
        return layout(spec, rank, resolved, self.rules)

    def budget_bytes(self, device: Device, parallel: Parallel, resolved: Resolved) -> int:
        """`v1/worker/utils.py: request_memory`."""
        return ceil(device.total_bytes * resolved.gpu_memory_utilization.value)

    def free_bytes(self, device: Device, components: Sequence[Component]) -> int:
        """`v1/worker/utils.py: request_memory` refuses a budget that is more."""
        before = (c for c in components if c.name in ("cuda_context", "nccl"))
        return device.total_bytes - sum(c.planned_bytes for c in before if not c.inside_budget)

    def not_free(self, free_bytes: int, device: Device, resolved: Resolved) -> str:
        """`v1/worker/utils.py: request_memory`, word for word."""
        share = resolved.gpu_memory_utilization.value
        free, total, wanted = (
            round(size / GiB, 2)
            for size in (free_bytes, device.total_bytes, ceil(device.total_bytes * share))
        )
        return (
            f"Free memory on device cuda:0 ({free}/{total} GiB) on startup is less than desired "
            f"GPU memory utilization ({share}, {wanted} GiB). Decrease GPU memory utilization or "
            "reduce GPU memory used by other processes."
        )

    def pool_blocks(self, available_blocks: int, layout: KVLayout, resolved: Resolved) -> int:
        """The user may say how many blocks there are, whatever fits."""
        return resolved.asked.num_gpu_blocks_override or available_blocks

    def cache_tokens(self, blocks: int, layout: KVLayout, length: int) -> int:
        """Before 0.20, the blocks that a group gets if all get as many, whatever a window saves.

        (`v1/core/kv_cache_utils.py: _report_kv_cache_config`.)
        """
        if self.rules.tokens_from_concurrency:
            return super().cache_tokens(blocks, layout, length)
        size = min(kind.block_size or layout.block_size for kind in layout.groups)
        return blocks // len(layout.groups) * size * layout.context_parallel_size

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


def _unless(value: int, default: int) -> int | None:
    return None if value == default else value


def _quantization(spec: ModelSpec, options: PlanOptions) -> Option[str | None]:
    if options.quantization_recipe is not None:
        return Option(value=options.quantization_recipe.label, origin="flag")
    if options.quantization is not None:
        return Option(value=options.quantization, origin="flag")
    name = None if spec.quantization is None else spec.quantization.name
    return Option(value=name, origin="config")


def _batch_defaults(rules: Rules, device: Device | None, entrypoint: str) -> tuple[int, int]:
    """`max_num_batched_tokens` and `max_num_seqs` by device and entry point."""
    server = entrypoint == "server"
    total_bytes = device.total_bytes if device else 80 * GiB
    if total_bytes >= 160 * GiB:
        return (rules.large_server_tokens if server else 16384), 1024
    name = "" if device is None else device.name.split("-")[0]
    if total_bytes >= 70 * GiB and name not in rules.small_devices:
        return (8192 if server else 16384), 1024
    return (2048 if server else 8192), 256
