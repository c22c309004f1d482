"""Persimmon: squared ReLU, biases everywhere, and LayerNorms of each head. vLLM had it to 0.25."""

from tightfit.model.blocks.attention import Projections, QKNorm
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("PersimmonForCausalLM",)

_DEFAULTS = {
    "vocab_size": 262_144,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "max_position_embeddings": 16384,
    "partial_rotary_factor": 0.5,
}


def spec(config: Config) -> ModelSpec:
    """All heads are KV heads."""
    config = config.with_defaults(_DEFAULTS)
    normed = config.boolean("qk_layernorm", default=True)
    attention = decoder.attention(
        config,
        default_theta=25_000.0,
        qk_norm=QKNorm.HEAD if normed else QKNorm.NONE,
        qk_norm_bias=True,
        qkv_bias=True,
        output_bias=True,
        names=Projections(
            fused="query_key_value",
            by_group=True,
            output="dense",
            query_norm="q_layernorm",
            key_norm="k_layernorm",
        ),
    )
    mlp = DenseMLP(
        intermediate_size=config.integer("intermediate_size"),
        activation=config.text("hidden_act", default="relu2"),
        bias=True,
        gated=False,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        norm_eps=config.number("layer_norm_eps", default=1e-5),
        norm_bias=True,
        names=Names(norm="model.final_layernorm"),
        verified_for_sharding=False,
    )
