"""What sparse attention works in: DeepSeek V3.2's and V4's, as vLLM serves them on Hopper.

Its buffers lie in the one workspace that experts use too, at different times (`v1/worker/
workspace.py`), so the largest user decides. M is max_num_batched_tokens, L max_model_len, H the
hidden size, b bytes of an element; heads are the rank's, padded to what the kernels take.
Sources, vLLM 0.25.1 and 0.32: `layers/sparse_attn_indexer.py`, `v1/attention/backends/mla/
{indexer,flashmla_sparse}.py`, `models/deepseek_v4/{attention,nvidia/flashmla}.py`.
"""

from collections.abc import Iterator

from tightfit.model.blocks.base import Mixer
from tightfit.model.blocks.compressed_attention import CompressedAttention, HyperConnections
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.cache import CacheKind, TokenCache
from tightfit.model.layout import Rank
from tightfit.model.spec import Layer
from tightfit.planner.engines.vllm_setting import Setting
from tightfit.units import KiB, MiB, cdiv, round_up

INDEXER_LOGITS = 512 * MiB
"""VLLM_SPARSE_INDEXER_MAX_LOGITS_MB, which the profile run allocates for a moment."""
_TOPK_WORKSPACE = MiB
_GATHERED_CONTEXTS, _GATHERED_LONG_CONTEXTS, _LONG = 5, 2, 256 * KiB
"""How many contexts of L tokens are gathered at once, the latter where L is more than 256 Ki."""
_KEYS_FOR_LATENTS = 8
"""The indexer gathers so many times the tokens, as its keys are so much smaller than latents."""
_CHUNK = 4
"""Prompts that V4 gathers at once (`DeepseekV4Attention.PREFILL_CHUNK_SIZE`)."""
_BF16 = 2


def sparse_workspaces(setting: Setting) -> Iterator[tuple[int, str]]:
    """The buffers of each user of the workspace, and their formula."""
    for mixer in setting.mixers:
        for cache in indexer_keys(mixer, setting.rank):
            rows = _KEYS_FOR_LATENTS * _contexts(setting) // cache.tokens_per_row
            yield (
                rows * cache.key_size + _TOPK_WORKSPACE,
                f"keys that the indexer gathers, {rows} rows x {cache.key_size} bytes",
            )
        if not _on_hopper(setting):
            continue
        if isinstance(mixer, LatentAttention) and mixer.index_topk:
            yield _flashmla(setting, mixer)
        elif isinstance(mixer, CompressedAttention):
            yield _compressed(setting, mixer)


def indexer_keys(mixer: Mixer, rank: Rank) -> list[TokenCache]:
    """What an indexer keeps of tokens; nothing where a mixer has none of its own."""
    return [
        cache
        for cache in mixer.caches(rank)
        if isinstance(cache, TokenCache) and cache.kind is CacheKind.INDEXER
    ]


def compressed_stage(setting: Setting, layer: Layer, mixer: CompressedAttention) -> dict[str, int]:
    """The residual streams, queries and outputs of padded heads, and the indexer's logits."""
    m, b = setting.max_num_batched_tokens, setting.element_bytes
    streams = max(one.streams for one in layer.extras if isinstance(one, HyperConnections))
    heads = _compressed_heads(mixer, setting.rank)
    index = mixer.index
    compressors = [mixer.compressor, None if index is None else index.compressor]
    scores = sum(2 * 4 * one.width for one in compressors if one is not None)
    logits = 0 if index is None else INDEXER_LOGITS
    features = (streams + 1) * setting.spec.hidden_size + 2 * heads * mixer.head_dim
    name = (
        f"compressed attention ({streams + 1}H + 2 x {heads} x {mixer.head_dim}) x M x b + "
        f"{scores} x M + {logits} for the indexer's logits"
    )
    return {name: m * (features * b + scores) + logits}


def indexer_stage(setting: Setting, mixer: LatentAttention) -> dict[str, int]:
    """The indexer's logits beside the queries of latent attention."""
    q = mixer.heads(mixer.qk_head_dim).span(setting.rank)[1]
    beside = 2 * setting.hidden_bytes + setting.max_num_batched_tokens * q * setting.element_bytes
    name = f"the indexer's logits {INDEXER_LOGITS} + (2H + Q) x M x b with Q = {q}"
    return {name: INDEXER_LOGITS + beside}


def _on_hopper(setting: Setting) -> bool:
    """Whether FlashMLA attends, as is taken for granted of a device of unknown kind."""
    capability = None if setting.device is None else setting.device.capability
    return capability is None or capability[0] == 9


def _contexts(setting: Setting) -> int:
    """Tokens of context that a prefill gathers at most."""
    short = setting.max_model_len <= _LONG or not setting.rules.gathers_less
    return setting.max_model_len * (_GATHERED_CONTEXTS if short else _GATHERED_LONG_CONTEXTS)


def _flashmla(setting: Setting, mixer: LatentAttention) -> tuple[int, str]:
    """Queries side by side, and what fp8 latents are decoded to."""
    m, key, value = setting.max_num_batched_tokens, mixer.latent_size, mixer.kv_lora_rank
    heads = mixer.heads(1).span(setting.rank)[1]
    # bfloat16 kernels take a multiple of 64 heads on Hopper.
    padded = round_up(heads, 64)
    packed = setting.options.kv_cache_dtype.startswith("fp8")
    copies = setting.rules.copies_sparse_queries
    columns = (padded if copies and not packed else heads) * key
    if packed and copies:
        columns += padded * (key + value) + heads * value
    latents = _contexts(setting) * key if packed else 0
    formula = f"sparse attention, ({columns} x M + {latents}) x {_BF16} with M = {m}"
    return (columns * m + latents) * _BF16, formula


def _compressed(setting: Setting, mixer: CompressedAttention) -> tuple[int, str]:
    """The rows, the window and the step's own keys of several prompts, decoded."""
    m = setting.max_num_batched_tokens
    rows = mixer.window + m
    if mixer.compressor is not None:
        rows += cdiv(setting.max_model_len, mixer.compressor.ratio)
    chosen = round_up((mixer.index.topk if mixer.index else 0) + mixer.window, 128)
    formula = (
        f"compressed attention, {_CHUNK} x {rows} rows x {mixer.head_dim} x {_BF16} + 4 x M x "
        f"({chosen} + 1) with M = {m}"
    )
    return _CHUNK * rows * mixer.head_dim * _BF16 + 4 * m * (chosen + 1), formula


def _compressed_heads(mixer: CompressedAttention, rank: Rank) -> int:
    """`DeepseekV4FlashMLAAttention.get_padded_num_q_heads`."""
    return 64 if mixer.num_heads // rank.parallel.tensor_parallel_size <= 64 else 128
