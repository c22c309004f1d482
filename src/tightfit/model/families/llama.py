"""Llama 2, 3.x and those that are Llama by another name: SmolLM2, DeepSeek-R1-Distill-Llama."""

from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("LlamaForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """Plain decoder; biases are options of the config, which InternLM 3 spells otherwise."""
    bias = config.boolean("attention_bias") or config.boolean("bias")
    attention = decoder.attention(
        config, qkv_bias=config.boolean("qkv_bias", default=bias), output_bias=bias
    )
    mlp = decoder.dense_mlp(config, bias=config.boolean("mlp_bias"))
    return decoder.model(config, decoder.uniform(config, attention, mlp))
