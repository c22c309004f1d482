"""Falcon 1: queries, keys and values in one tensor, MLP beside attention, one norm or two.

The old architecture (7B) has a single KV head (`multi_query`) or none less than query heads
(`falcon-rw`, with alibi); the new one (40B, 180B) groups them. The fused tensor interleaves the
heads of a group, which changes no size.
"""

from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("FalconForCausalLM",)

_KEYS = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
_DEFAULTS = {
    "hidden_size": 4544,
    "vocab_size": 65024,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
}


def spec(config: Config) -> ModelSpec:
    """Which norms there are follows from `parallel_attn` and the architecture."""
    config = config.renamed(_KEYS).with_defaults(_DEFAULTS)
    hidden_size, bias = config.integer("hidden_size"), config.boolean("bias")
    new = config.boolean("new_decoder_architecture")
    heads = config.integer("num_attention_heads")
    if new:
        kv_heads = config.integer("num_kv_heads", "n_head_kv", default=heads)
    else:
        kv_heads = 1 if config.boolean("multi_query", default=True) else heads
    attention = decoder.plain_attention(
        config,
        num_kv_heads=kv_heads,
        rope=None if config.boolean("alibi") else decoder.rope(config, hidden_size // heads or 1),
        qkv_bias=bias,
        output_bias=bias,
        alibi=config.boolean("alibi"),
        module="self_attention",
        names=Projections(fused="query_key_value", output="dense", by_group=True),
    )
    mlp = DenseMLP(
        intermediate_size=config.integer("ffn_hidden_size", default=4 * hidden_size),
        activation=config.text("activation", default="gelu"),
        bias=bias,
        gated=False,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        default_tied=True,
        norm_eps=config.number("layer_norm_epsilon", default=1e-5),
        norm_bias=True,
        parallel_residual=new or config.boolean("parallel_attn", default=True),
        names=Names(
            embedding="transformer.word_embeddings",
            layers="transformer.h",
            norm="transformer.ln_f",
            layer_norms=_norms(config, new=new),
        ),
        every_stage_has_ends=True,
    )


def _norms(config: Config, *, new: bool) -> tuple[str, ...]:
    if not config.boolean("parallel_attn", default=True):
        return ("input_layernorm", "post_attention_layernorm")
    two = config.integer("num_ln_in_parallel_attn", default=2 if new else 1) == 2
    return ("ln_attn", "ln_mlp") if two else ("input_layernorm",)
