"""gpt-oss: every other layer slides, heads have sinks, and experts have biases.

Published checkpoints hold the experts as mxfp4; the names here are those of the plain form, from
which those derive. vLLM (`models/gpt_oss.py`) rotates with a float32 table.
"""

from dataclasses import replace

from tightfit.model.blocks.mlp import ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("GptOssForCausalLM",)

_DEFAULTS = {
    "num_hidden_layers": 36,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "vocab_size": 201_088,
    "num_attention_heads": 64,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
}


def spec(config: Config) -> ModelSpec:
    """Layers slide by `layer_types`, else those of even number."""
    config = config.with_defaults(_DEFAULTS)
    bias = config.boolean("attention_bias", default=True)
    rope = decoder.rope(config, config.integer("head_dim"), default_theta=150_000.0)
    attention = decoder.attention(
        config,
        default_kv_heads=8,
        rope=replace(rope, dtype="F32"),
        qkv_bias=bias,
        output_bias=bias,
        sinks=True,
    )
    experts = MoE(
        num_experts=config.integer(
            "num_local_experts", "num_experts", default=128, maximum=decoder.MOST_EXPERTS
        ),
        top_k=config.integer("num_experts_per_tok", default=4),
        intermediate_size=config.integer("intermediate_size"),
        activation="swigluoai",
        renormalize=True,
        router="router",
        router_bias=True,
        own_kernels=True,
        names=ExpertNames(
            gate_up="experts.gate_up_proj",
            down="experts.down_proj",
            stacked=True,
            transposed=True,
            alternating=True,
            gate_up_bias="experts.gate_up_proj_bias",
            down_bias="experts.down_proj_bias",
        ),
    )
    layers = decoder.windowed(
        config,
        attention,
        experts,
        window=config.integer("sliding_window", default=128),
        is_sliding=lambda i: i % 2 == 0,
    )
    return decoder.model(config, layers, every_stage_has_ends=True)
