"""GLM-4-9B in transformers' form, and GLM-4-0414, which normalizes before and after each block."""

from dataclasses import replace

from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("GlmForCausalLM", "Glm4ForCausalLM")

_DEFAULTS = {
    "vocab_size": 151_552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "partial_rotary_factor": 0.5,
}


def spec(config: Config) -> ModelSpec:
    """Half of each head is rotated, and the checkpoint fuses gate and up."""
    fourth = config.strings("architectures")[0] == "Glm4ForCausalLM"
    config = config.with_defaults(_DEFAULTS)
    attention = decoder.attention(config, qkv_bias=config.boolean("attention_bias", default=True))
    assert attention.rope is not None
    attention = replace(attention, rope=replace(attention.rope, interleaved=True))
    mlp = decoder.dense_mlp(config, fused="gate_up_proj")
    norms = (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        norm_eps=config.number("rms_norm_eps", default=1.5625e-07),
        names=Names(layer_norms=norms) if fourth else Names(),
        # vLLM has no class for the first, and cuts its fused matrix as if it were one.
        verified_for_sharding=fourth,
        ignored_sources=decoder.layers_after(config, "num_nextn_predict_layers"),
    )
