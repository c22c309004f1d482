"""dots.llm1: Qwen3's norms of queries and keys, and DeepSeek's kind of experts."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import QKNorm
from tightfit.model.blocks.mlp import MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("Dots1ForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """Windows, which no published model has, are refused."""
    if config.boolean("attention_bias"):
        raise UnsupportedModelError("attention_bias in Dots1ForCausalLM is not modelled")
    if any(kind != "full_attention" for kind in decoder.layer_types(config)):
        raise UnsupportedModelError("a sliding window in Dots1ForCausalLM is not modelled")
    attention = decoder.attention(config, qk_norm=QKNorm.HEAD)
    width = config.integer("moe_intermediate_size", default=1408)
    activation = config.text("hidden_act", default="silu")
    shared = config.integer("n_shared_experts", default=0, minimum=0)
    experts = MoE(
        num_experts=config.integer("n_routed_experts", maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=width,
        activation=activation,
        renormalize=config.boolean("norm_topk_prob"),
        routing=decoder.corrected_routing(config),
        correction_bias="gate.e_score_correction_bias",
        shared=decoder.shared_mlp(width * shared, activation),
    )
    first = config.integer("first_k_dense_replace", default=0, minimum=0)
    layers = decoder.mixed(
        config,
        (attention,) * decoder.num_layers(config),
        dense=decoder.dense_mlp(config),
        sparse=experts,
        is_sparse=lambda i: i >= first,
    )
    return decoder.model(config, layers)
