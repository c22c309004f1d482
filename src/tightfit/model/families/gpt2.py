"""GPT-2 and GPTBigCode (StarCoder 1): learned positions, fused projections, LayerNorms with a bias.

GPT-2's Conv1D stores its matrices as `[in, out]`. Buffers of the causal mask are not loaded.
"""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.families.positions import learned_positions
from tightfit.model.layout import Stage
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("GPT2LMHeadModel", "GPTBigCodeForCausalLM")

_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
_DEFAULTS = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
    "layer_norm_epsilon": 1e-5,
}


def spec(config: Config) -> ModelSpec:
    """GPTBigCode has one KV head (`multi_query`) and ordinary matrices."""
    code = config.strings("architectures")[0] == "GPTBigCodeForCausalLM"
    for key in (
        "add_cross_attention",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
    ):
        if config.boolean(key):
            raise UnsupportedModelError(f"{key} in GPT-2 is not modelled, and vLLM refuses it")
    config = config.with_defaults(_DEFAULTS).renamed(_KEYS)
    hidden_size = config.integer("hidden_size")
    attention = decoder.plain_attention(
        config,
        num_kv_heads=1 if code and config.boolean("multi_query", default=True) else None,
        qkv_bias=True,
        output_bias=True,
        module="attn",
        names=Projections(fused="c_attn", output="c_proj", transposed=not code),
    )
    if not config.boolean("scale_attn_weights", default=True):
        attention = replace(attention, scale=1.0)
    mlp = DenseMLP(
        intermediate_size=config.integer("intermediate_size", default=4 * hidden_size),
        activation=config.text(
            "activation_function", default="gelu_pytorch_tanh" if code else "gelu_new"
        ),
        bias=True,
        gated=False,
        up="c_fc",
        down="c_proj",
        transposed=not code,
    )
    positions = config.integer("max_position_embeddings")
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        default_tied=True,
        norm_eps=config.number("layer_norm_epsilon"),
        norm_bias=True,
        names=Names(
            embedding="transformer.wte",
            layers="transformer.h",
            norm="transformer.ln_f",
            layer_norms=("ln_1", "ln_2"),
        ),
        extras=(
            learned_positions(
                "transformer.wpe", positions, hidden_size, Stage.FIRST if code else Stage.EVERY
            ),
        ),
        positions="transformer.wpe.weight",
        every_stage_has_ends=not code,
        ignored_sources=(r"\.attn\.(bias|masked_bias)$", r"^transformer\.bias$"),
        verified_for_sharding=not code,
    )
