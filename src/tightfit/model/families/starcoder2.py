"""StarCoder 2: LayerNorms and biases everywhere, a plain MLP, and a window on all layers."""

from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("Starcoder2ForCausalLM",)

_DEFAULTS = {
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 4096,
}


def spec(config: Config) -> ModelSpec:
    """`use_bias` is about all matrices but the tied head."""
    config = config.with_defaults(_DEFAULTS)
    bias = config.boolean("use_bias", default=True)
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    attention = decoder.attention(config, window=window, qkv_bias=bias, output_bias=bias)
    mlp = DenseMLP(
        intermediate_size=config.integer("intermediate_size"),
        activation=config.text("hidden_act", default="gelu_pytorch_tanh"),
        bias=bias,
        gated=False,
        up="c_fc",
        down="c_proj",
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        default_tied=True,
        norm_eps=config.number("norm_epsilon", default=1e-5),
        norm_bias=True,
    )
