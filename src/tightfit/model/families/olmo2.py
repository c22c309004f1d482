"""OLMo 2: norms after attention and MLP, and over all of the queries and keys."""

from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, NormStyle, QKNorm

ARCHITECTURES = ("Olmo2ForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """The q and k norms span all heads, so every rank holds them whole."""
    bias = config.boolean("attention_bias")
    attention = decoder.attention(config, qk_norm=QKNorm.FULL, qkv_bias=bias, output_bias=bias)
    return decoder.model(
        config,
        decoder.uniform(config, attention, decoder.dense_mlp(config)),
        norm_style=NormStyle.POST,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
    )
