"""GLM-4.5 to 4.7: grouped attention, half of each head rotated, and DeepSeek's kind of experts.

Source: vLLM's `models/glm4_moe.py`, which routes in float32; the defaults are transformers'.
"""

from tightfit.model.blocks.attention import QKNorm
from tightfit.model.blocks.mlp import MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("Glm4MoeForCausalLM",)

_DEFAULTS = {
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "num_nextn_predict_layers": 1,
}


def spec(config: Config) -> ModelSpec:
    """`attention_bias` is of queries, keys and values only."""
    config = config.with_defaults(_DEFAULTS)
    attention = decoder.attention(
        config,
        default_kv_heads=8,
        qkv_bias=config.boolean("attention_bias"),
        qk_norm=QKNorm.HEAD if config.boolean("use_qk_norm") else QKNorm.NONE,
    )
    width = config.integer("moe_intermediate_size", default=1408)
    activation = config.text("hidden_act", default="silu")
    shared = config.integer("n_shared_experts", default=1, minimum=0)
    experts = MoE(
        num_experts=config.integer("n_routed_experts", default=128, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=8),
        intermediate_size=width,
        activation=activation,
        renormalize=config.boolean("norm_topk_prob", default=True),
        router_dtype="F32",
        routing=decoder.corrected_routing(config),
        correction_bias="gate.e_score_correction_bias",
        shared=decoder.shared_mlp(width * shared, activation),
    )
    first = config.integer("first_k_dense_replace", default=1, minimum=0)
    layers = decoder.mixed(
        config,
        (attention,) * decoder.num_layers(config),
        dense=decoder.dense_mlp(config),
        sparse=experts,
        is_sparse=lambda i: i >= first,
    )
    return decoder.model(
        config,
        layers,
        ignored_sources=decoder.layers_after(config, "num_nextn_predict_layers"),
    )
