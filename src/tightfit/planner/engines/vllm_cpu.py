"""vLLM's CPU backend: weights, buffers and the pool share the memory of a NUMA node.

Sources, relative to the vLLM 0.32 package: `platforms/cpu.py`, `v1/worker/cpu_worker.py`,
`engine/arg_utils.py: get_batch_defaults`, `model_executor/layers/utils.py:
dispatch_cpu_unquantized_gemm`; the defaults of older versions are those of `vllm_versions`.

The total of the device is that of one node, and every rank takes its share of its own node, as
vLLM does. Ranks on one node must share it: `--gpu-memory-utilization` is then per rank.
"""

from dataclasses import replace
from math import prod

from tightfit.errors import UsageError
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.mlp import MoE
from tightfit.model.layout import Parallel, Rank
from tightfit.model.spec import ModelSpec, ropes
from tightfit.planner.devices import Device
from tightfit.planner.engines.vllm import VLLM
from tightfit.planner.engines.vllm_buffers import persistent_buffers, rope_rows
from tightfit.planner.engines.vllm_host import (
    BASELINE_PROVENANCE,
    LIBRARY_BYTES,
    worker_bytes,
)
from tightfit.planner.engines.vllm_kv import latents
from tightfit.planner.engines.vllm_setting import Setting
from tightfit.planner.engines.vllm_versions import CpuPool
from tightfit.planner.options import Option, PlanOptions, Resolved, pick
from tightfit.planner.plan import Component
from tightfit.planner.weights import held
from tightfit.units import GiB, format_bytes

OLD_POOL_BYTES = 4 * GiB
"""Up to 0.12, unless VLLM_CPU_KVCACHE_SPACE says otherwise."""
_LATENT_BLOCK = 16
_TOKENS = {"server": 2048, "llm": 4096}
_SEQS = {"server": 128, "llm": 256}


class VLLMCPU(VLLM):
    """vLLM on a CPU, in the versions that `vllm_versions` knows."""

    models_driver = False
    not_modelled = ("speculative decoding", "other processes on the machine")

    def __init__(self, options: PlanOptions) -> None:
        super().__init__(options.device, options.engine_version)
        assert self.device is not None
        self.total_bytes = self.device.total_bytes
        self.utilization = options.gpu_memory_utilization or self.rules.utilization
        asked = _asked_pool(options)
        self.out_of_memory = (
            f"ValueError: Available memory on node 0 (.../{self.total_bytes / GiB:.2f} GiB) on kv "
            f"cache allocation is less than requested memory for kv ({(asked or 0) / GiB:.2f} "
            "GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory "
            "used by other processes."
        )

    def resolve(self, spec: ModelSpec, options: PlanOptions) -> Resolved:
        """The backend's own defaults; nothing is captured, and scheduling is synchronous.

        Raises:
            UsageError: batch sizes that contradict each other, or a pool of no whole GiB.
        """
        world = options.tensor_parallel_size * options.pipeline_parallel_size
        tokens = options.max_num_batched_tokens or _TOKENS[options.entrypoint] * world
        seqs = options.max_num_seqs or _SEQS[options.entrypoint] * world
        base = replace(options, use_v2_model_runner=False, max_num_seqs=None, enforce_eager=True)
        base = replace(base, max_num_batched_tokens=max(tokens, seqs), async_scheduling=False)
        resolved = super().resolve(spec, replace(base, max_num_seqs=seqs))
        length = resolved.max_model_len.value
        default = self.default_tokens(spec, options, length, tokens, seqs)
        latent = bool(latents(spec))
        if latent and self.rules.cpu_whole_latent_prompts:
            # Without AMX prompts are not chunked, whatever the user asks.
            batched = Option(value=max(length, 2048), origin="engine default")
        else:
            batched = pick(options.max_num_batched_tokens, default)
        sequences = pick(options.max_num_seqs, min(seqs, batched.value))
        if batched.value < sequences.value:
            raise UsageError(
                f"--max-num-batched-tokens {batched.value} is less than --max-num-seqs "
                f"{sequences.value}",
                hint="vLLM needs at least one token per sequence",
            )
        forced = Option(value=False, origin="engine default")
        return replace(
            resolved,
            max_num_batched_tokens=batched,
            max_num_seqs=sequences,
            kv_cache_memory_bytes=self._pool(options),
            block_size=self._block_size(spec, options),
            enforce_eager=pick(options.enforce_eager or None, False),
            cudagraph_mode=Option(value="NONE", origin="engine default"),
            cudagraph_capture_sizes=Option(value=(), origin="engine default"),
            model_runner=Option(value="v1", origin="engine default"),
            async_scheduling=forced,
            enable_prefix_caching=forced if latent else resolved.enable_prefix_caching,
            asked=options,
        )

    def _pool(self, options: PlanOptions) -> Option[int | None]:
        """VLLM_CPU_KVCACHE_SPACE overrides the flag; without both, the version decides."""
        asked = _asked_pool(options)
        pool = self.rules.cpu_pool
        if asked is not None and (asked or pool is CpuPool.BUDGET):
            return Option(value=asked, origin="flag")
        if pool is CpuPool.BUDGET:
            return Option(value=None, origin="engine default")
        if pool is CpuPool.HALF:
            return Option(value=self.total_bytes // 2, origin="engine default")
        return Option(value=OLD_POOL_BYTES, origin="engine default")

    def _block_size(self, spec: ModelSpec, options: PlanOptions) -> Option[int]:
        if latents(spec) and self.rules.cpu_whole_latent_prompts:
            return Option(value=_LATENT_BLOCK, origin="engine default")
        size = pick(options.block_size, self.rules.cpu_block_size)
        if spec.is_windowed:
            least = self.rules.cpu_window_block_size
            return Option(value=max(size.value, least), origin=size.origin)
        return size

    def components(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> tuple[Component, ...]:
        """What a worker has resident when the pool is sized, and the step, which comes on top."""
        setting = self.setting(spec, rank, resolved)
        return (
            _after_load(setting),
            _persistent_buffers(setting),
            *_step(setting),
            _process_baseline(setting),
        )

    def budget_bytes(self, device: Device, parallel: Parallel, resolved: Resolved) -> int:
        """`cpu_worker.py: requested_cpu_memory`; before 0.20 nothing but memory itself."""
        if self.rules.cpu_pool is not CpuPool.BUDGET:
            return device.total_bytes
        return super().budget_bytes(device, parallel, resolved)

    def refusal(self, needed_bytes: int, available_bytes: int, longest: int, length: int) -> str:
        """`cpu_worker.py: determine_available_memory`, where weights leave nothing.

        What is available depends on other processes, and is left open.
        """
        if available_bytes > 0 or self.rules.cpu_pool is not CpuPool.BUDGET:
            return super().refusal(needed_bytes, available_bytes, longest, length)
        total, requested = self.total_bytes / GiB, self.total_bytes * self.utilization / GiB
        return (
            f"Available memory on node 0 (.../{total:.2f} GiB) on kv cache allocation is less than "
            f"requested memory for kv ({available_bytes / GiB:.2f}/{requested:.2f} GiB). Reduce "
            "CPU memory used by other processes."
        )


def _asked_pool(options: PlanOptions) -> int | None:
    space = options.cpu_kvcache_space
    if space is None:
        return options.kv_cache_memory_bytes
    if space != int(space):
        raise UsageError(
            f"--cpu-kvcache-space {space:g} is not a whole number of GiB, as vLLM demands",
            hint="use --kv-cache-memory-bytes",
        )
    return int(space) * GiB


def _after_load(setting: Setting) -> Component:
    """Rope tables, absorbed latents, and tables that oneDNN packs without freeing the original.

    The embedding and the head are packed each, also where they are one table.
    """
    rank, b = setting.rank, setting.element_bytes
    tables = [rope_rows(rope) * rope.rotary_dim * b for rope in ropes(setting.layers)]
    copies = sum(_vocabulary_bytes(setting, name) for name in _vocabularies(setting))
    mixers = (mixer for layer in setting.layers for mixer in layer.mixers)
    absorbed = sum(m.absorbed_elements(rank) * b for m in mixers if isinstance(m, LatentAttention))
    formula = "rope tables (positions x rotary_dim x b): " + (" + ".join(map(str, tables)) or "0")
    formula += f"; packed copies of the embedding and the head: {copies}"
    if absorbed:
        formula += f"; copies of kv_b_proj that latent attention absorbs: {absorbed}"
    return Component(
        name="weights_after_load",
        planned_bytes=sum(tables) + copies + absorbed,
        origin="derived",
        formula=formula,
    )


def _vocabularies(setting: Setting) -> tuple[str, ...]:
    """The modules of the rank with a row for each token; a tied head has its own."""
    names, spec = setting.spec.names, setting.spec
    head = not spec.pooling and (not spec.tie_word_embeddings or spec.has_lm_head_module)
    return ((names.embedding,) if setting.first_stage else ()) + (
        (names.head,) if setting.last_stage and head else ()
    )


def _vocabulary_bytes(setting: Setting, module: str) -> int:
    spec, b = setting.spec, setting.element_bytes
    wanted = spec.names.embedding if spec.tie_word_embeddings else module
    return sum(
        prod(weight.rank_shape(setting.rank)) * b
        for weight in held(spec, setting.rank)
        if weight.name == f"{wanted}.weight"
    )


def _persistent_buffers(setting: Setting) -> Component:
    """The V1 runner's, which has one copy of what it otherwise keeps on host and device."""
    n, length = setting.max_num_seqs, setting.max_model_len
    buffers, tokens = persistent_buffers(setting), 5 * n * length
    return replace(
        buffers,
        planned_bytes=buffers.planned_bytes + tokens,
        formula=f"{buffers.formula} + tokens of all requests 5 x N x L: {tokens}",
        inside_budget=True,
    )


def _step(setting: Setting) -> tuple[Component, ...]:
    """The largest layer, and the sampler; the pool is sized as if they were nothing."""
    m, b, n, v = setting.max_num_batched_tokens, setting.element_bytes, setting.rows, setting.vocab
    width = 0
    for layer in setting.kinds:
        queries, keys = setting.widths(layer)
        chosen = layer.mlp.top_k if isinstance(layer.mlp, MoE) else 1
        width = max(width, 2 * queries + 2 * keys, 3 * chosen * setting.inner(layer))
    hidden = setting.spec.hidden_size
    found = [
        Component(
            name="activations",
            planned_bytes=m * (3 * hidden + width) * b,
            origin="derived",
            formula=f"an estimate: M x (3 x H + the widest of a layer) x b = {m} x (3 x {hidden} + "
            f"{width}) x {b}; vLLM sizes the pool without it",
            inside_budget=False,
        )
    ]
    if setting.last_stage:
        sampler = n * v * (b + 12)
        found.append(
            Component(
                name="logits_and_sampler",
                planned_bytes=sampler,
                origin="derived",
                formula=f"an estimate: N x V x (b + 12) = {n} x {v} x ({b} + 12), logits and three "
                "copies in float32; vLLM sizes the pool without it",
                inside_budget=False,
            )
        )
    return tuple(found)


def _process_baseline(setting: Setting) -> Component:
    """What `RSS` of the worker counts beside the model: it is subtracted from the pool."""
    several = setting.rank.parallel.world_size > 1
    size, parts = worker_bytes(cpu=True, eager=setting.eager, several=several)
    library = LIBRARY_BYTES["cpu"]
    return Component(
        name="process_baseline",
        planned_bytes=size + library,
        origin="calibrated",
        formula=f"{parts} + {format_bytes(library)} of mapped libraries; {BASELINE_PROVENANCE}",
    )
