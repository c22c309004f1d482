"""Llama-Nemotron Super and Ultra (DeciLM): a Llama whose layers a search made unequal.

`block_configs` says for every layer whether it has attention and how many KV heads share it, and
whether it has an MLP and how wide. vLLM builds no layer whose attention or MLP is one matrix
(`models/nemotron_nas.py`).
"""

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec
from tightfit.units import round_up

ARCHITECTURES = ("DeciLMForCausalLM",)

_WIDTH_UNIT = 256


def spec(config: Config) -> ModelSpec:
    """Layers alike share one object."""
    blocks = config.sections("block_configs")
    count = decoder.num_layers(config)
    if len(blocks) != count:
        raise ConfigError(
            f"{config.name} has {len(blocks)} block_configs for num_hidden_layers = {count}",
            hint="correct the config.json, or take that of the original checkpoint",
        )
    alike: dict[Layer, Layer] = {}
    layers = (_layer(config, block) for block in blocks)
    return decoder.model(
        config,
        tuple(alike.setdefault(layer, layer) for layer in layers),
        verified_for_sharding=False,
    )


def _layer(config: Config, block: Config) -> Layer:
    attention, mlp = _attention(config, block), _mlp(config, block)
    norms = ("input_layernorm",) * (attention is not None)
    norms += ("post_attention_layernorm",) * (mlp is not None)
    return Layer(mixers=() if attention is None else (attention,), mlp=mlp, norms=norms)


def _part(block: Config, key: str) -> Config:
    part = block.section(key) or Config({}, name=f"{block.name}: {key}")
    for option in ("replace_with_linear", "sparsify"):
        if part.raw(option):
            raise UnsupportedModelError(f"{part.name} has {option}, which vLLM does not build")
    return part


def _attention(config: Config, block: Config) -> Attention | None:
    part = _part(block, "attention")
    if part.boolean("no_op"):
        return None
    for option in ("window_length", "num_sink_tokens"):
        if part.has(option):
            raise UnsupportedModelError(f"{part.name} has {option}, which is not modelled")
    heads = config.integer("num_attention_heads")
    group = part.integer("n_heads_in_group")
    bias = config.boolean("attention_bias") or config.boolean("bias")
    return decoder.attention(
        config.with_defaults({"num_key_value_heads": heads // group or 1}),
        qkv_bias=config.boolean("qkv_bias", default=bias),
        output_bias=bias,
    )


def _mlp(config: Config, block: Config) -> DenseMLP | None:
    part = _part(block, "ffn")
    if part.boolean("no_op"):
        return None
    if part.has("ffn_mult"):
        exact = int(2 * part.positive("ffn_mult") * config.integer("hidden_size") / 3)
        width = round_up(exact, _WIDTH_UNIT)
    else:
        width = part.integer("intermediate_size")
    activation = part.text("hidden_act", default=config.text("hidden_act", default="silu"))
    return DenseMLP(intermediate_size=width, activation=activation, bias=config.boolean("mlp_bias"))
