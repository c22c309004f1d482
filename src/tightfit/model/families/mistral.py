"""Mistral: Llama with 8 KV heads by default and, in the first release, a sliding window."""

from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("MistralForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """All layers slide, or none."""
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    attention = decoder.attention(config, default_kv_heads=8, window=window)
    return decoder.model(config, decoder.uniform(config, attention, decoder.dense_mlp(config)))
