"""Phi-1, 1.5 and 2: MLP beside attention, one LayerNorm, biases everywhere, partial rotation.

The first releases have a config of their own (`phi-msft`, remote code) and fuse the projections;
transformers' class has separate ones.
"""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("PhiForCausalLM",)

_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_head_kv",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
}
_DEFAULTS = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "vocab_size": 51200,
    "hidden_act": "gelu_new",
}


def spec(config: Config) -> ModelSpec:
    """The head has a bias too."""
    first = config.text("model_type", default="phi") != "phi"
    config = config.renamed(_KEYS).with_defaults(_DEFAULTS)
    hidden_size, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.boolean("qk_layernorm"):
        raise UnsupportedModelError("qk_layernorm in PhiForCausalLM is not modelled")
    fraction = config.integer("rotary_dim", default=32) / (hidden_size // heads) if first else 0.5
    attention = decoder.attention(
        config.with_defaults({"partial_rotary_factor": fraction}),
        qkv_bias=True,
        output_bias=True,
        module="mixer" if first else "self_attn",
        names=Projections(fused="Wqkv", output="out_proj")
        if first
        else Projections(output="dense"),
    )
    mlp = DenseMLP(
        intermediate_size=config.integer("intermediate_size", default=4 * hidden_size),
        activation=config.text("hidden_act"),
        bias=True,
        gated=False,
        up="fc1",
        down="fc2",
    )
    names = Names(norm="model.final_layernorm", layer_norms=("input_layernorm",))
    if first:
        names = Names(
            embedding="transformer.embd.wte",
            layers="transformer.h",
            norm="lm_head.ln",
            head="lm_head.linear",
            layer_norms=("ln",),
        )
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        norm_eps=config.number("layer_norm_eps", "layer_norm_epsilon", default=1e-5),
        norm_bias=True,
        parallel_residual=True,
        head_bias=True,
        names=names,
        ignored_sources=(r"\.rotary_emb\.", r"\.inner_attn\.", r"\.inner_cross_attn\."),
        # vLLM adds the bias of the head while it loads a plain checkpoint, and only then.
        verified_for_sharding=False,
    )
