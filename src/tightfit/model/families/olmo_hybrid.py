"""OLMo Hybrid: gated delta nets with norms before, and OLMo 3's attention in every fourth layer.

Source: vLLM's `models/olmo_hybrid.py`; the defaults are transformers'.
"""

from dataclasses import replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import QKNorm
from tightfit.model.blocks.gated_delta_net import OlmoDeltaNet
from tightfit.model.config import Config
from tightfit.model.families import decoder, hybrid
from tightfit.model.spec import Layer, ModelSpec

ARCHITECTURES = ("OlmoHybridForCausalLM",)

_DEFAULTS = {
    "vocab_size": 100_352,
    "hidden_size": 3840,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 30,
    "max_position_embeddings": 65_536,
}
_KINDS = {"linear_attention": "linear_attention", "full_attention": "full_attention"}
_NORMS = {
    "linear_attention": ("input_layernorm", "post_attention_layernorm"),
    "full_attention": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


def spec(config: Config) -> ModelSpec:
    """Attention knows positions only where the config has a rope.

    Raises:
        UnsupportedModelError: a bias, or a delta net without a gate.
    """
    config = config.with_defaults(_DEFAULTS)
    if config.boolean("attention_bias"):
        raise UnsupportedModelError("attention_bias in OlmoHybridForCausalLM is not modelled")
    if not config.boolean("linear_use_gate", default=True):
        raise UnsupportedModelError("OlmoHybridForCausalLM without linear_use_gate is not modelled")
    count = decoder.num_layers(config)
    words = config.strings("layer_types") or hybrid.every(config, default=4)
    kinds = hybrid.layer_kinds(config, words, _KINDS, count=count)
    parameters = config.section("rope_parameters")
    rotated = config.has("rope_theta") or (parameters is not None and parameters.has("rope_theta"))
    attention = decoder.attention(config, qk_norm=QKNorm.FULL)
    mixers = {
        "linear_attention": _delta_net(config),
        "full_attention": attention if rotated else replace(attention, rope=None),
    }
    mlp = decoder.dense_mlp(config)
    alike = {
        kind: Layer(mixers=(mixer,), mlp=mlp, norms=_NORMS[kind]) for kind, mixer in mixers.items()
    }
    return decoder.model(
        config,
        tuple(alike[kind] for kind in kinds),
        every_stage_has_ends=True,
        verified_for_sharding=False,
    )


def _delta_net(config: Config) -> OlmoDeltaNet:
    heads = config.integer("num_attention_heads")
    keys = config.integer("linear_num_key_heads", default=heads)
    values = config.integer("linear_num_value_heads", default=heads)
    if values % keys:
        raise ConfigError(
            f"{config.name} has linear_num_value_heads = {values}, which is not a multiple of "
            f"linear_num_key_heads = {keys}",
            hint="correct the config.json",
        )
    size = config.integer(
        "linear_key_head_dim", default=int(0.75 * config.integer("hidden_size") / keys) or 1
    )
    return OlmoDeltaNet(
        num_k_heads=keys,
        num_v_heads=values,
        head_k_dim=size,
        head_v_dim=config.integer("linear_value_head_dim", default=2 * size),
        conv_kernel=config.integer("linear_conv_kernel_dim", default=4),
        interleaved=False,
    )
