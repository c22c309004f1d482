"""Granite 3: Llama with four multipliers (embeddings, attention, residuals, logits)."""

from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("GraniteForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """`logits_scaling` divides, the other multipliers multiply."""
    bias = config.boolean("attention_bias")
    attention = decoder.attention(
        config,
        scale=config.number("attention_multiplier", default=1.0),
        qkv_bias=bias,
        output_bias=bias,
    )
    mlp = decoder.dense_mlp(config, bias=config.boolean("mlp_bias"))
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        embedding_scale=config.number("embedding_multiplier", default=1.0),
        residual_scale=config.number("residual_multiplier", default=1.0),
        logits_scale=1.0 / (config.number("logits_scaling", default=1.0) or 1.0),
    )
