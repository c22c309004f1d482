"""The KV cache as vLLM lays it out: dtypes, blocks, and what a sequence reserves.

Sources, relative to the vLLM 0.32 package: `platforms/cuda.py`, `platforms/interface.py:
update_block_size_for_backend`, `v1/core/kv_cache_utils.py: get_kv_cache_configs`,
`config/vllm.py: max_in_flight_tokens`. How layers form groups is in `planner.kv_cache`.
"""

from dataclasses import replace

from tightfit.errors import UsageError
from tightfit.model.blocks.block_sparse_attention import BlockSparseAttention
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.layout import Parallel, Rank
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import Device
from tightfit.planner.engines.vllm_versions import Rules
from tightfit.planner.kv_cache import CacheDtypes, KVLayout, kv_layout, layer_kinds
from tightfit.planner.options import Option, Resolved
from tightfit.units import TORCH_DTYPES

_BLOCK = 16
_FLASHMLA_BLOCK = 64
"""Tokens of a block where only FlashMLA reads the cache: fp8 latents, and sparse attention."""
_FLASHINFER_MLA_BLOCK = 32


def layout(spec: ModelSpec, rank: Rank, resolved: Resolved, rules: Rules) -> KVLayout:
    """The blocks of a rank, by the groups of the whole model.

    Raises:
        UsageError: context parallelism, and layers with a window.
    """
    asked, caching = resolved.asked, resolved.enable_prefix_caching
    windows = rules.hybrid_groups and not asked.disable_hybrid_kv_cache_manager
    dtypes = _cache_dtypes(resolved)
    stages = [
        layer_kinds(spec, replace(rank, pp_rank=stage), dtypes, windows=windows)
        for stage in range(rank.parallel.pipeline_parallel_size)
    ]
    shared = asked.decode_context_parallel_size
    if shared > 1 and any(kind.is_local for kinds in stages for kind in kinds):
        raise UsageError(
            "vLLM does not share the context of layers with a window",
            hint="leave --decode-context-parallel-size out",
        )
    tokens = resolved.max_num_batched_tokens.value
    steps = _steps(rank.parallel, resolved) if rules.steps_in_flight else 1
    return kv_layout(
        stages[rank.pp_rank],
        stages=stages,
        stage=rank.pp_rank,
        block_size=resolved.block_size.value,
        latent_multiple=rules.latent_multiple,
        in_flight_tokens=steps * tokens,
        state_blocks=2 if caching is not None and caching.value else 1,
        encoder_tokens=max(spec.encoder_tokens, tokens) if spec.encoder_tokens else 0,
        padding_ratio=rules.padding_ratio,
        context_parallel_size=shared,
    )


def _steps(parallel: Parallel, resolved: Resolved) -> int:
    """Steps whose tokens a window holds (`config/vllm.py: max_concurrent_batches`).

    One for each stage; asynchronous scheduling adds one, unless the V1 runner has stages.
    """
    stages, overlap = parallel.pipeline_parallel_size, resolved.async_scheduling
    old = resolved.model_runner is not None and resolved.model_runner.value == "v1"
    if overlap is None or not overlap.value or (old and stages > 1):
        return stages
    return stages + 1


def usual_block(spec: ModelSpec, kv_dtype: str, device: Device | None, rules: Rules) -> int:
    """The smallest block that the attention backend takes (`platforms/cuda.py`).

    MiniMax-M3 chooses whole blocks, which are pages. For latent attention the backend is FlashInfer
    on data center Blackwells. FlashMLA reads fp8 on Hopper, which a device of unknown kind is taken
    for; elsewhere Triton's kernel does.
    """
    found = latents(spec)
    if not found:
        mixers = (mixer for layer in spec.layers for mixer in layer.mixers)
        sparse = (m.sparse_block_size for m in mixers if isinstance(m, BlockSparseAttention))
        return max(sparse, default=_BLOCK)
    if any(latent.index_topk for latent in found):
        return _FLASHMLA_BLOCK
    major = 9 if device is None or device.capability is None else device.capability[0]
    if major == 10:
        return _FLASHINFER_MLA_BLOCK if rules.smallest_blocks else _FLASHMLA_BLOCK
    return _FLASHMLA_BLOCK if major == 9 and kv_dtype.startswith(("F8", "fp8")) else _BLOCK


def latents(spec: ModelSpec) -> list[LatentAttention]:
    """The attention of layers that keep latents."""
    mixers = (mixer for layer in spec.layers for mixer in layer.mixers)
    return [mixer for mixer in mixers if isinstance(mixer, LatentAttention) and mixer.absorbed]


def packed_latents(spec: ModelSpec, dtype: Option[str]) -> Option[str]:
    """Sparse attention has rows of its own for an fp8 cache (`models/config.py`)."""
    sparse = any(latent.index_topk for latent in latents(spec))
    if sparse and dtype.value.startswith("F8"):
        return Option(value="fp8_ds_mla", origin=dtype.origin)
    return dtype


def _cache_dtypes(resolved: Resolved) -> CacheDtypes:
    asked, model = resolved.asked, resolved.dtype.value
    conv = model if asked.mamba_cache_dtype == "auto" else TORCH_DTYPES[asked.mamba_cache_dtype]
    ssm = asked.mamba_ssm_cache_dtype
    return CacheDtypes(
        tokens=resolved.kv_cache_dtype.value,
        conv=conv,
        ssm=conv if ssm == "auto" else TORCH_DTYPES[ssm],
        # `NemotronHForCausalLMConfig`: the config's dtype is for `auto` only.
        given=frozenset() if ssm == "auto" else frozenset({"ssm"}),
    )
