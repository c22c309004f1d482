"""Nemotron-4, Minitron and Jais 2: squared ReLU without a gate, LayerNorms with a bias.

Nemotron's norms multiply by `1 + weight`.
"""

from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("NemotronForCausalLM", "Jais2ForCausalLM")

_NEMOTRON = {
    "vocab_size": 256_000,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 32,
    "num_attention_heads": 48,
    "max_position_embeddings": 4096,
    "partial_rotary_factor": 0.5,
    "hidden_act": "relu2",
}
_JAIS = {
    "vocab_size": 150_272,
    "hidden_size": 3328,
    "intermediate_size": 26624,
    "num_hidden_layers": 32,
    "num_attention_heads": 26,
    "max_position_embeddings": 8192,
    "hidden_act": "relu2",
    "attention_bias": True,
    "mlp_bias": True,
}


def spec(config: Config) -> ModelSpec:
    """Half of Nemotron's heads is rotated by default."""
    jais = config.strings("architectures")[0] == "Jais2ForCausalLM"
    config = config.renamed({"partial_rotary_factor": "rope_percent"})
    config = config.with_defaults(_JAIS if jais else _NEMOTRON)
    bias = config.boolean("attention_bias")
    attention = decoder.attention(config, qkv_bias=bias, output_bias=bias)
    mlp = decoder.dense_mlp(config, bias=config.boolean("mlp_bias"), gated=False)
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        norm_eps=config.number("norm_eps", "layer_norm_eps", default=1e-5),
        norm_bias=True,
        norm_unit_offset=not jais,
        verified_for_sharding=not jais,
    )
