"""DeepSeek MoE, V2 to V3.2, and what shares their layers: Kimi K2, GLM-4.7-Flash, GLM-5.

Latent attention, the first layers dense, then experts with an MLP that all tokens share. The first
DeepSeek MoE has plain attention; V3.2 and GLM-5 add an indexer. Sources: vLLM's
`models/deepseek_v2.py`, `models/deepseek_v32/`, and `models/glm4_moe_lite.py`; the defaults are
transformers'.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Rope
from tightfit.model.blocks.base import Mixer
from tightfit.model.blocks.latent_attention import Indexer, LatentAttention
from tightfit.model.blocks.mlp import MoE, Routing
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class _Defaults:
    """What a config class of transformers fills in; None where the key must be there."""

    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    n_routed_experts: int | None = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int | None = 8
    moe_intermediate_size: int = 2048
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    topk_method: str = "noaux_tc"
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    index_n_heads: int | None = None
    """None where the model attends to all tokens."""
    router_dtype: str | None = None


_V3 = _Defaults()
_DEFAULTS: Mapping[str, _Defaults] = {
    "DeepseekForCausalLM": _Defaults(
        n_routed_experts=None,
        n_shared_experts=0,
        num_experts_per_tok=None,
        moe_intermediate_size=1407,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        max_position_embeddings=2048,
    ),
    "DeepseekV2ForCausalLM": _Defaults(
        n_routed_experts=64,
        n_shared_experts=2,
        moe_intermediate_size=1407,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        max_position_embeddings=2048,
    ),
    "DeepseekV3ForCausalLM": _V3,
    "DeepseekV32ForCausalLM": replace(_V3, index_n_heads=64, max_position_embeddings=163_840),
    "GlmMoeDsaForCausalLM": replace(
        _V3,
        n_group=1,
        topk_group=1,
        q_lora_rank=2048,
        qk_nope_head_dim=192,
        v_head_dim=256,
        rms_norm_eps=1e-5,
        max_position_embeddings=202_752,
        index_n_heads=32,
    ),
    "Glm4MoeLiteForCausalLM": replace(
        _V3,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.8,
        q_lora_rank=768,
        qk_nope_head_dim=192,
        v_head_dim=256,
        n_routed_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=1536,
        first_k_dense_replace=1,
        rms_norm_eps=1e-5,
        max_position_embeddings=202_752,
        router_dtype="F32",
    ),
}
ARCHITECTURES = tuple(_DEFAULTS)


def spec(config: Config) -> ModelSpec:
    """The architecture decides the defaults, and whether there is an indexer."""
    architecture = config.strings("architectures")[0]
    defaults = _DEFAULTS[architecture]
    for key in ("attention_bias", "mlp_bias"):
        if config.boolean(key):
            raise UnsupportedModelError(f"{key} in {architecture} is not modelled")
    if not config.boolean("is_causal", default=True):
        raise UnsupportedModelError(f"{architecture} with is_causal = false is not modelled")
    config = config.with_defaults({"max_position_embeddings": defaults.max_position_embeddings})
    count = decoder.num_layers(config)
    if defaults.index_n_heads is not None:
        mixers = _sparse(config, latent_attention(config, defaults), defaults.index_n_heads, count)
    elif _plain_attention(config):
        mixers = (decoder.attention(config),) * count
    else:
        mixers = (latent_attention(config, defaults),) * count
    first = config.integer(
        "first_k_dense_replace", default=defaults.first_k_dense_replace, minimum=0
    )
    step = config.integer("moe_layer_freq", default=1)
    layers = decoder.mixed(
        config,
        mixers,
        dense=decoder.dense_mlp(config),
        sparse=_experts(config, defaults),
        is_sparse=lambda i: i >= first and i % step == 0,
    )
    return decoder.model(
        config,
        layers,
        norm_eps=config.number("rms_norm_eps", default=defaults.rms_norm_eps),
        ignored_sources=decoder.layers_after(config, "num_nextn_predict_layers", "num_mtp_layers"),
        verified_for_sharding=defaults.index_n_heads is None and not _plain_attention(config),
    )


def latent_attention(config: Config, defaults: _Defaults = _V3) -> LatentAttention:
    """MLA as the config gives it; what it leaves out is `defaults`'.

    Raises:
        ConfigError: a size is missing or impossible.
        UnsupportedModelError: a rope of another kind.
    """
    rank = config.integer("q_lora_rank", default=0, minimum=0)
    if not config.mentions("q_lora_rank"):
        rank = defaults.q_lora_rank or 0
    nope = config.integer("qk_nope_head_dim", default=defaults.qk_nope_head_dim, minimum=0)
    rope_dim = config.integer("qk_rope_head_dim", default=64)
    rope = deepseek_rope(config, rope_dim)
    scaling = rope.scaling or {}
    correction = 1.0
    if scaling.get("rope_type") == "deepseek_yarn":
        mscale = scaling.get("mscale_all_dim", 0.0)
        correction = 0.1 * mscale * math.log(max(scaling["factor"], 1.0)) + 1.0
    return LatentAttention(
        num_heads=config.integer("num_attention_heads"),
        q_lora_rank=rank or None,
        kv_lora_rank=config.integer("kv_lora_rank", default=512),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope_dim,
        v_head_dim=config.integer("v_head_dim", default=defaults.v_head_dim),
        rope=rope,
        scale=(nope + rope_dim) ** -0.5 * correction * correction,
    )


def deepseek_rope(config: Config, rotary_dim: int) -> Rope:
    """The rope of the rotated features, in pairs of neighbours; any scaling is DeepSeek's yarn.

    Raises:
        ConfigError: a scaling without a factor.
    """
    rope = replace(decoder.rope(config, rotary_dim), interleaved=True)
    if rope.scaling is None:
        return rope
    if "factor" not in rope.scaling:
        raise ConfigError(
            f"{config.name} has a rope_scaling without a 'factor'", hint="correct the config.json"
        )
    unscaled = rope.scaling.get("attention_factor") == 1.0
    kind = "deepseek_llama_scaling" if unscaled else "deepseek_yarn"
    return replace(rope, scaling={**rope.scaling, "rope_type": kind})


def _plain_attention(config: Config) -> bool:
    """The first models have plain attention, and small ones in the same layers: DeepSeek-VL2-tiny.

    vLLM tells the former by their model type (`models/deepseek_v2.py: use_mha`).
    """
    if config.strings("architectures")[0] == "DeepseekForCausalLM":
        kind = config.text("model_type", default="deepseek")
        if kind != "deepseek":
            raise UnsupportedModelError(f"DeepseekForCausalLM of type {kind!r} is not modelled")
        return True
    sizes = [config.raw(key, default=0) for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
    told = config.mentions("qk_nope_head_dim") and config.mentions("qk_rope_head_dim")
    return told and sizes == [0, 0]


def _sparse(
    config: Config, attention: LatentAttention, index_heads: int, count: int
) -> tuple[Mixer, ...]:
    """Layers with an indexer, and those that reuse the choice of the one before (IndexCache)."""
    assert attention.rope is not None
    if attention.q_lora_rank is None:
        raise UnsupportedModelError("an indexer without q_lora_rank is not modelled")
    topk = config.integer("index_topk", default=2048)
    interleaved = config.boolean("indexer_rope_interleave")
    indexer = Indexer(
        num_heads=config.integer("index_n_heads", default=index_heads),
        head_dim=config.integer("index_head_dim", default=128),
        topk=topk,
        rope=replace(attention.rope, interleaved=interleaved),
    )
    reusing = replace(attention, index_topk=topk)
    choosing = replace(reusing, indexer=indexer)
    kinds = config.strings("indexer_types")
    pattern = config.text("index_topk_pattern", default="")
    frequency = config.integer("index_topk_freq", default=1)
    offset = config.integer("index_skip_topk_offset", default=2, minimum=0)
    reused = [max(i - offset + 1, 0) % frequency != 0 for i in range(count)]
    if pattern:
        reused = [kind == "S" for kind in pattern[:count].ljust(count, "F")]
    if kinds and [kind == "shared" for kind in kinds] != reused:
        raise UnsupportedModelError(
            f"{config.name} has indexer_types that differ from index_topk_freq or "
            "index_topk_pattern, which is not modelled"
        )
    return tuple(reusing if reuses else choosing for reuses in reused)


def _routing(config: Config, defaults: _Defaults, method: str) -> Routing:
    default = "sigmoid" if method == "noaux_tc" else "softmax"
    sigmoid = config.text("scoring_func", default=default) == "sigmoid"
    scale = config.number("routed_scaling_factor", default=defaults.routed_scaling_factor)
    if method == "greedy":
        return Routing(sigmoid=sigmoid, scale=scale)
    return Routing(
        sigmoid=sigmoid,
        groups=config.integer("n_group", default=defaults.n_group),
        top_groups=config.integer("topk_group", default=defaults.topk_group),
        scale=scale,
    )


def _experts(config: Config, defaults: _Defaults) -> MoE:
    width = config.integer("moe_intermediate_size", default=defaults.moe_intermediate_size)
    activation = config.text("hidden_act", default="silu")
    shared = config.integer("n_shared_experts", default=0, minimum=0)
    if not config.mentions("n_shared_experts"):
        shared = defaults.n_shared_experts
    method = config.text("topk_method", default=defaults.topk_method)
    return MoE(
        num_experts=config.integer(
            "n_routed_experts",
            "num_experts",
            default=defaults.n_routed_experts,
            maximum=decoder.MOST_EXPERTS,
        ),
        top_k=config.integer("num_experts_per_tok", default=defaults.num_experts_per_tok),
        intermediate_size=width,
        activation=activation,
        renormalize=config.boolean("norm_topk_prob", default=defaults.norm_topk_prob),
        routing=_routing(config, defaults, method),
        router_dtype=defaults.router_dtype,
        correction_bias="gate.e_score_correction_bias" if method == "noaux_tc" else None,
        shared=decoder.shared_mlp(width * shared, activation),
    )
