"""BLOOM: alibi, biases everywhere, and a LayerNorm right after the embedding."""

from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.linear import norm
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.layout import Stage
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("BloomForCausalLM",)

_KEYS = {
    "hidden_size": "n_embed",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "seq_length",
}
_DEFAULTS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 250_880,
}


def spec(config: Config) -> ModelSpec:
    """The fused tensor interleaves heads, which changes no size."""
    config = config.renamed(_KEYS).with_defaults(_DEFAULTS)
    hidden_size = config.integer("hidden_size")
    attention = decoder.plain_attention(
        config,
        qkv_bias=True,
        output_bias=True,
        alibi=True,
        module="self_attention",
        names=Projections(fused="query_key_value", output="dense", by_group=True),
    )
    mlp = DenseMLP(
        intermediate_size=4 * hidden_size,
        activation="gelu",
        bias=True,
        gated=False,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
    )
    first = norm("transformer.word_embeddings_layernorm", hidden_size, Stage.EVERY, bias=True)
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        default_tied=True,
        norm_eps=config.number("layer_norm_epsilon", default=1e-5),
        norm_bias=True,
        names=Names(
            embedding="transformer.word_embeddings",
            layers="transformer.h",
            norm="transformer.ln_f",
        ),
        extras=tuple(first),
        every_stage_has_ends=True,
    )
