"""Bailing's Ling and Ring, 1 and 2.0: a fused projection, and experts as DeepSeek has them.

Source: vLLM's `models/bailing_moe.py`. Their config classes are code beside the checkpoints, so
what decides shapes and has no safe default must be in the config.
"""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Attention, Projections, QKNorm
from tightfit.model.blocks.mlp import MoE, Routing
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("BailingMoeForCausalLM", "BailingMoeV2ForCausalLM")

_NAMES = Projections(
    fused="query_key_value",
    output="dense",
    query_norm="query_layernorm",
    key_norm="key_layernorm",
)
_SECOND = {
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "num_experts": 256,
    "num_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "moe_router_enable_expert_bias": True,
    "max_position_embeddings": 32_768,
}
"""Of `BailingMoeV2Config`, which lies beside the checkpoints of Ling 2.0."""
_ROUTER_DTYPES = {"fp32": "F32", "bf16": "BF16"}


def spec(config: Config) -> ModelSpec:
    """Ling 2.0 chooses experts by sigmoids and a bias, and normalizes queries and keys.

    Raises:
        UnsupportedModelError: experts with biases, which vLLM does not load.
    """
    architecture = config.strings("architectures")[0]
    if architecture == "BailingMoeV2ForCausalLM":
        config = config.with_defaults(_SECOND)
    if config.boolean("use_bias", default=True):
        raise UnsupportedModelError(f"use_bias in {architecture} is not modelled")
    first = config.integer("first_k_dense_replace", default=0, minimum=0)
    normed = config.boolean("norm_head")
    layers = decoder.mixed(
        config,
        (_attention(config),) * decoder.num_layers(config),
        dense=decoder.dense_mlp(config),
        sparse=_experts(config),
        is_sparse=lambda i: i >= first,
    )
    return decoder.model(
        config,
        layers,
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        names=Names(embedding="model.word_embeddings"),
        ignored_sources=decoder.layers_after(config, "num_nextn_predict_layers"),
        unmodelled="a head that is normalized when it is loaded" if normed else None,
        verified_for_sharding=False,
    )


def _attention(config: Config) -> Attention:
    normed = config.boolean("use_qk_norm")
    attention = decoder.attention(
        config,
        module="attention",
        names=_NAMES,
        qkv_bias=config.boolean("use_qkv_bias"),
        qk_norm=QKNorm.HEAD if normed else QKNorm.NONE,
        qk_norm_bias=normed and not config.boolean("use_rmsnorm"),
    )
    rope = attention.rope
    assert rope is not None
    rotary = config.integer(
        "rotary_dim", default=rope.rotary_dim, maximum=attention.head_dim, minimum=2
    )
    return replace(attention, rope=replace(rope, rotary_dim=rotary))


def _experts(config: Config) -> MoE:
    width = config.integer("moe_intermediate_size")
    activation = config.text("hidden_act", default="silu")
    each = config.integer("moe_shared_expert_intermediate_size", default=width)
    shared = config.integer("num_shared_experts", default=0, minimum=0) * each
    corrected = config.boolean("moe_router_enable_expert_bias")
    dtype = config.text("router_dtype", default="") or None
    return MoE(
        num_experts=config.integer("num_experts", maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=width,
        activation=activation,
        renormalize=config.boolean("norm_topk_prob"),
        routing=Routing(
            sigmoid=config.text("score_function", default="softmax") == "sigmoid",
            groups=config.integer("n_group", default=1),
            top_groups=config.integer("topk_group", default=1),
            scale=config.number("routed_scaling_factor", default=1.0),
        ),
        router_dtype=None if dtype is None else _ROUTER_DTYPES.get(dtype, "BF16"),
        correction_bias="gate.expert_bias" if corrected else None,
        shared=decoder.shared_mlp(shared, activation),
    )
