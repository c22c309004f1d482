"""MPT: alibi, LayerNorms without a bias, a plain MLP. vLLM had it until 0.28."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("MPTForCausalLM",)

_KEYS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_seq_len",
}
_DEFAULTS = {
    "d_model": 2048,
    "n_layers": 24,
    "n_heads": 16,
    "max_seq_len": 2048,
    "vocab_size": 50368,
}


def spec(config: Config) -> ModelSpec:
    """What vLLM does not build is refused."""
    config = config.with_defaults(_DEFAULTS).renamed(_KEYS)
    options = config.section("attn_config") or Config({})
    if not options.boolean("alibi", default=True) or options.boolean("qk_ln"):
        raise UnsupportedModelError("MPT without alibi, or with qk_ln, is not modelled")
    bias = not config.boolean("no_bias", default=True)
    hidden_size = config.integer("hidden_size")
    attention = decoder.plain_attention(
        config,
        num_kv_heads=options.integer("kv_n_heads", default=config.integer("num_attention_heads")),
        qkv_bias=bias,
        output_bias=bias,
        alibi=True,
        module="attn",
        names=Projections(fused="Wqkv", output="out_proj"),
    )
    mlp = DenseMLP(
        intermediate_size=config.integer("expansion_ratio", default=4) * hidden_size,
        activation="gelu",
        bias=bias,
        gated=False,
        module="ffn",
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        default_tied=True,
        norm_eps=config.number("layer_norm_epsilon", default=1e-5),
        norm_bias=bias,
        norm_centers=True,
        names=Names(
            embedding="transformer.wte",
            layers="transformer.blocks",
            norm="transformer.norm_f",
            layer_norms=("norm_1", "norm_2"),
        ),
        every_stage_has_ends=True,
        verified_for_sharding=False,
    )
