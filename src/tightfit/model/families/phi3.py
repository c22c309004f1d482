"""Phi-3, Phi-3.5, Phi-4: Llama whose checkpoint already holds fused projections."""

from tightfit.model.blocks.attention import Projections
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("Phi3ForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """Partial rotary factors and longrope come through `decoder.rope`."""
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    attention = decoder.attention(config, window=window, names=Projections(fused="qkv_proj"))
    return decoder.model(
        config,
        decoder.uniform(config, attention, decoder.dense_mlp(config, fused="gate_up_proj")),
        norm_eps=config.number("rms_norm_eps", default=1e-5),
    )
