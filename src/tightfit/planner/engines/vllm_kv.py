"""The KV cache as vLLM lays it out: dtypes, blocks, and what a sequence reserves.

Sources, relative to the vLLM 0.32 package: `platforms/cuda.py`, `platforms/interface.py:
update_block_size_for_backend`, `v1/core/kv_cache_utils.py: get_kv_cache_configs`,
`config/vllm.py: max_in_flight_tokens`. How layers form groups is in `planner.kv_cache`.
"""

from dataclasses import replace

from tightfit.errors import UsageError
from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.block_sparse_attention import BlockSparseAttention
from tightfit.model.blocks.compressed_attention import CompressedAttention
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.layout import Parallel, Rank
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import Device
from tightfit.planner.engines.vllm_versions import Rules
from tightfit.planner.kv_cache import KVLayout, kv_layout
from tightfit.planner.kv_kinds import CacheDtypes, layer_kinds
from tightfit.planner.options import Option, PlanOptions, Resolved
from tightfit.units import TORCH_DTYPES

_BLOCK = 16
_FLASHMLA_BLOCK = 64
"""Tokens of a block where only FlashMLA reads the cache: fp8 latents, and sparse attention."""
_FLASHINFER_MLA_BLOCK = 32
_COMPRESSED_BLOCK = 256
_PACKED = "fp8_ds_mla"
_GLM_SPARSE = "GlmMoeDsaForCausalLM"
_FLASHINFER_HEADS = (128, 192)
"""Features of a head without positions for which FlashInfer has sparse kernels."""


def layout(spec: ModelSpec, rank: Rank, resolved: Resolved, rules: Rules) -> KVLayout:
    """The blocks of a rank, by the groups of the whole model.

    Raises:
        UsageError: context parallelism, which layers with a window or these heads do not allow.
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
    if shared > 1:
        _check_context_parallel(spec, asked)
    tokens = resolved.max_num_batched_tokens.value
    steps = _steps(rank.parallel, resolved) if rules.steps_in_flight else 1
    return kv_layout(
        stages[rank.pp_rank],
        stages=stages,
        stage=rank.pp_rank,
        block_size=resolved.block_size.value,
        latent_multiple=rules.latent_multiple,
        packs_pages=rules.packs_pages,
        in_flight_tokens=steps * tokens,
        state_blocks=2 if caching is not None and caching.value else 1,
        encoder_tokens=max(spec.encoder_tokens, tokens) if spec.encoder_tokens else 0,
        padding_ratio=rules.padding_ratio,
        context_parallel_size=shared,
    )


def _check_context_parallel(spec: ModelSpec, asked: PlanOptions) -> None:
    """Ranks that hold the same KV heads share the context, each with heads of its own to query.

    (`config/model.py: verify_with_parallel_config`; of latents every rank has all.)
    """
    ranks, shared = asked.tensor_parallel_size, asked.decode_context_parallel_size
    found = (mixer for mixer in spec.mixers if isinstance(mixer, Attention))
    for heads, kv_heads in {(one.num_heads, one.num_kv_heads) for one in found}:
        most = ranks // kv_heads
        if shared > most or heads // kv_heads % shared:
            raise UsageError(
                f"--decode-context-parallel-size {shared} with {heads} heads of {kv_heads} KV "
                f"heads on {ranks} ranks",
                hint=f"vLLM shares the context among ranks that hold the same KV head: at most "
                f"{most} here, and a divisor of {heads // kv_heads}"
                if most > 1
                else f"it needs a --tensor-parallel-size of {2 * kv_heads} at least",
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

    MiniMax-M3 chooses whole blocks, which are pages; DeepSeek V4's kernels know one size. For
    latent attention the backend is FlashInfer on data center Blackwells. FlashMLA reads fp8 on
    Hopper, which a device of unknown kind is taken for; elsewhere Triton's kernel does.
    """
    found = latents(spec)
    if not found:
        if has_compressed(spec):
            return _COMPRESSED_BLOCK
        sparse = (m.sparse_block_size for m in spec.mixers if isinstance(m, BlockSparseAttention))
        return max(sparse, default=_BLOCK)
    if any(latent.index_topk for latent in found):
        return _FLASHMLA_BLOCK
    major = 9 if device is None or device.capability is None else device.capability[0]
    if major == 10:
        return _FLASHINFER_MLA_BLOCK if rules.smallest_blocks else _FLASHMLA_BLOCK
    return _FLASHMLA_BLOCK if major == 9 and kv_dtype.startswith(("F8", "fp8")) else _BLOCK


def latents(spec: ModelSpec) -> list[LatentAttention]:
    """The attention of layers that keep latents."""
    return [one for one in spec.mixers if isinstance(one, LatentAttention) and one.absorbed]


def has_compressed(spec: ModelSpec) -> bool:
    """Whether layers attend to rows that stand for several tokens."""
    return any(isinstance(mixer, CompressedAttention) for mixer in spec.mixers)


def packed_latents(
    spec: ModelSpec, dtype: Option[str], asked: str, device: Device | None, rules: Rules
) -> Option[str]:
    """The rows of sparse attention, by the kernels that a device has for it.

    FlashMLA, on Hopper, packs fp8 latents into rows of their own; FlashInfer keeps them plain on
    data center Blackwells, and packs whatever it is not told otherwise on others
    (`layers/attention/mla_attention.py: _canonicalize_sparse_mla_kv_cache_dtype`,
    `platforms/cuda.py`, `models/config.py: GlmMoeDsaForCausalLM`). Compressed attention knows
    packed rows only (`_resolve_dsv4_kv_cache_dtype`).

    Args:
        spec: the model.
        dtype: as it would be elsewhere.
        asked: `--kv-cache-dtype`.
        device: None is taken for a Hopper.
        rules: of the version.
    """
    packed = Option(value=_PACKED, origin=dtype.origin)
    if has_compressed(spec):
        return packed
    sparse = [latent for latent in latents(spec) if latent.index_topk]
    if not sparse or asked == _PACKED:
        return dtype
    major = 9 if device is None or device.capability is None else device.capability[0]
    is_fp8 = dtype.value.startswith("F8")
    if major == 12:
        # DeepSeek V3.2 takes bfloat16 for another word for auto.
        return packed if is_fp8 or asked in ("auto", "bfloat16") else dtype
    if major == 10 and rules.plain_sparse_rows:
        if asked == "auto" and rules.fp8_for_glm and spec.architecture == _GLM_SPARSE:
            return Option(value="F8_E4M3", origin="engine default")
        plain = all(latent.qk_nope_head_dim in _FLASHINFER_HEADS for latent in sparse)
        return dtype if plain or not is_fp8 else packed
    return packed if is_fp8 else dtype


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
