"""MiMo-V2-Flash: five windows to one full layer, each kind with its own heads and base.

Keys are wider than values, sliding layers have sinks, and all layers but the first have experts.
Source: vLLM's `models/mimo_v2.py`; the defaults are transformers'.
"""

from collections.abc import Sequence
from dataclasses import replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Attention, Projections, Rope
from tightfit.model.blocks.mlp import MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("MiMoV2FlashForCausalLM",)

_DEFAULTS = {
    "head_dim": 192,
    "v_head_dim": 128,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}


def spec(config: Config) -> ModelSpec:
    """`hybrid_layer_pattern` has a 1 for layers that slide, `moe_layer_freq` for sparse ones."""
    config = config.with_defaults(_DEFAULTS)
    if config.boolean("add_full_attention_sink_bias"):
        raise UnsupportedModelError(
            "add_full_attention_sink_bias in MiMoV2FlashForCausalLM is not modelled"
        )
    if config.integer("n_shared_experts", default=0, minimum=0):
        raise UnsupportedModelError("a shared expert in MiMoV2FlashForCausalLM is not modelled")
    count = decoder.num_layers(config)
    full, sliding = _attention(config), _sliding(config)
    slides = _flags(config, "hybrid_layer_pattern", count) or [
        i > 0 and (i + 1) % 6 != 0 for i in range(count)
    ]
    sparse = _flags(config, "moe_layer_freq", count) or [i > 0 for i in range(count)]
    router = config.text("moe_router_dtype", default="float32")
    experts = MoE(
        num_experts=config.integer("n_routed_experts", default=256, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=8),
        intermediate_size=config.integer("moe_intermediate_size", default=2048),
        activation=config.text("hidden_act", default="silu"),
        renormalize=config.boolean("norm_topk_prob", default=True),
        router_dtype="F32" if router == "float32" else None,
        correction_bias="gate.e_score_correction_bias",
    )
    layers = decoder.mixed(
        config,
        [sliding if slid else full for slid in slides],
        dense=decoder.dense_mlp(config),
        sparse=experts,
        is_sparse=lambda i: bool(sparse[i]),
    )
    return decoder.model(
        config,
        layers,
        norm_eps=config.number("layernorm_epsilon", "rms_norm_eps", default=1e-5),
        ignored_sources=(r"(^|\.)mtp\.",),
        verified_for_sharding=False,
    )


def _attention(config: Config) -> Attention:
    return decoder.attention(
        config,
        rope=_rope(config, "full_attention", 5_000_000.0),
        value_dim=config.integer("v_head_dim"),
        qkv_bias=config.boolean("attention_bias"),
    )


def _sliding(config: Config) -> Attention:
    """Heads of its own, where the config has them."""
    full = _attention(config)
    head_dim = config.integer("swa_head_dim", default=full.head_dim)
    heads = config.integer("swa_num_attention_heads", default=full.num_heads)
    kv_heads = config.integer("swa_num_key_value_heads", default=full.num_kv_heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{config.name} has swa_num_attention_heads = {heads}, which is not a multiple of "
            f"swa_num_key_value_heads = {kv_heads}",
            hint="correct the config.json",
        )
    theta = config.positive("swa_rope_theta", default=10_000.0)
    rope = _rope(config, "sliding_attention", 10_000.0)
    nested = config.section("rope_parameters")
    return replace(
        full,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=config.integer("swa_v_head_dim", default=full.v_dim),
        scale=head_dim**-0.5,
        rope=rope if nested is not None else replace(rope, theta=theta),
        window=config.integer("sliding_window_size", "sliding_window", default=128),
        sinks=config.boolean("add_swa_attention_sink_bias"),
        names=Projections(sinks="attention_sink_bias"),
    )


def _rope(config: Config, kind: str, theta: float) -> Rope:
    return decoder.rope(config, config.integer("head_dim"), kind=kind, default_theta=theta)


def _flags(config: Config, key: str, count: int) -> Sequence[int]:
    flags = config.integers(key)
    if flags and len(flags) != count:
        raise ConfigError(
            f"{config.name} has {len(flags)} of {key} for num_hidden_layers = {count}",
            hint="correct the config.json",
        )
    return flags
