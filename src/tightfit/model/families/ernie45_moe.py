"""Ernie 4.5 MoE (text): a dense first layer, then experts with an MLP for all tokens.

Source: vLLM's `models/ernie45_moe.py`, which routes in float32; the defaults are transformers'.
"""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.mlp import MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("Ernie4_5_MoeForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """`moe_layer_start_index` to `moe_layer_end_index` have experts, every so many."""
    if config.boolean("use_bias"):
        raise UnsupportedModelError("use_bias in Ernie4_5_MoeForCausalLM is not modelled")
    config = config.with_defaults({"max_position_embeddings": 131_072, "rms_norm_eps": 1e-5})
    heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", default=config.integer("hidden_size") // heads or 1)
    rope = replace(decoder.rope(config, head_dim, default_theta=500_000.0), interleaved=True)
    attention = decoder.attention(config, default_kv_heads=4, rope=rope)
    width = config.integer("moe_intermediate_size", default=1536)
    activation = config.text("hidden_act", default="silu")
    count = config.integer(
        "moe_num_experts", "num_experts", default=64, maximum=decoder.MOST_EXPERTS
    )
    shared = config.integer("moe_num_shared_experts", default=2, minimum=0)
    experts = MoE(
        num_experts=count,
        top_k=config.integer("moe_k", "num_experts_per_tok", default=6),
        intermediate_size=width,
        activation=activation,
        renormalize=True,
        router_dtype="F32",
        correction_bias="moe_statics.e_score_correction_bias",
        correction_shape=(1, count),
        shared=decoder.shared_mlp(width * shared, activation),
    )
    layers = decoder.num_layers(config)
    first = config.integer("moe_layer_start_index", default=1, minimum=0)
    last = config.integer("moe_layer_end_index", default=-1, minimum=-1)
    step = config.integer("moe_layer_interval", default=1)
    end = layers - 1 if last < 0 else last
    return decoder.model(
        config,
        decoder.mixed(
            config,
            (attention,) * layers,
            dense=decoder.dense_mlp(config),
            sparse=experts,
            is_sparse=lambda i: first <= i <= end and (i + 1) % step == 0,
        ),
        default_tied=True,
        ignored_sources=(r"(^|\.)mtp_",),
        verified_for_sharding=False,
    )
