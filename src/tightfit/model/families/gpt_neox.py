"""GPT-NeoX, Pythia and Dolly: one fused tensor of queries, keys and values, biases everywhere."""

from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("GPTNeoXForCausalLM",)

_KEYS = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"}
_DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.25,
    "hidden_act": "gelu",
}


def spec(config: Config) -> ModelSpec:
    """Every head has keys of its own."""
    config = config.renamed(_KEYS).with_defaults(_DEFAULTS).without("num_key_value_heads")
    bias = config.boolean("attention_bias", default=True)
    attention = decoder.attention(
        config,
        qkv_bias=bias,
        output_bias=bias,
        module="attention",
        names=Projections(fused="query_key_value", output="dense", by_head=True),
    )
    mlp = DenseMLP(
        intermediate_size=config.integer("intermediate_size"),
        activation=config.text("hidden_act"),
        bias=True,
        gated=False,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        norm_eps=config.number("layer_norm_eps", default=1e-5),
        norm_bias=True,
        parallel_residual=config.boolean("use_parallel_residual", default=True),
        names=Names(
            embedding="gpt_neox.embed_in",
            layers="gpt_neox.layers",
            norm="gpt_neox.final_layer_norm",
            head="embed_out",
        ),
        ignored_sources=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
    )
