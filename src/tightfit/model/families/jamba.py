"""Jamba: Mamba with an attention layer now and then, and experts in every other layer."""

from dataclasses import replace

from tightfit.errors import ConfigError
from tightfit.model.blocks.mamba import Mamba1
from tightfit.model.blocks.mlp import MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.families.mamba import time_step_rank
from tightfit.model.spec import Layer, ModelSpec, Names

ARCHITECTURES = ("JambaForCausalLM",)

_DEFAULTS = {
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 262_144,
}


def spec(config: Config) -> ModelSpec:
    """Attention has no positions. Layers are chosen by a period and an offset."""
    config = config.with_defaults(_DEFAULTS)
    hidden_size = config.integer("hidden_size")
    mamba = Mamba1(
        intermediate_size=config.integer("mamba_expand", default=2) * hidden_size,
        state_size=config.integer("mamba_d_state", default=16),
        conv_kernel=config.integer("mamba_d_conv", default=4),
        time_step_rank=time_step_rank(config, "mamba_dt_rank", hidden_size),
        bias=config.boolean("mamba_proj_bias"),
        conv_bias=config.boolean("mamba_conv_bias", default=True),
        norms=True,
        module="mamba",
    )
    attention = replace(decoder.attention(config), rope=None)
    dense = decoder.dense_mlp(config, module="feed_forward")
    num_experts = config.integer(
        "num_experts", "num_local_experts", default=16, maximum=decoder.MOST_EXPERTS
    )
    experts = MoE(
        num_experts=num_experts,
        top_k=config.integer("num_experts_per_tok", default=2),
        intermediate_size=config.integer("intermediate_size"),
        activation=config.text("hidden_act", default="silu"),
        renormalize=False,
        module="feed_forward",
        router="router",
    )
    has_attention = _periodic(config, "attn_layer", period=8, offset=4)
    has_experts = _periodic(config, "expert_layer", period=2, offset=1)
    layers = {
        (mixer, sparse): Layer(
            mixers=(attention if mixer else mamba,),
            mlp=experts if sparse and num_experts > 1 else dense,
        )
        for mixer in (False, True)
        for sparse in (False, True)
    }
    return decoder.model(
        config,
        tuple(layers[pair] for pair in zip(has_attention, has_experts, strict=True)),
        names=Names(
            norm="model.final_layernorm", layer_norms=("input_layernorm", "pre_ff_layernorm")
        ),
        every_stage_has_ends=True,
    )


def _periodic(config: Config, key: str, *, period: int, offset: int) -> list[bool]:
    """Which layers are at `offset` of a `period`."""
    period = config.integer(f"{key}_period", default=period)
    offset = config.integer(f"{key}_offset", default=offset, minimum=0)
    if offset >= period:
        raise ConfigError(
            f"{config.name} has {key}_offset = {offset}, which is not below "
            f"{key}_period = {period}",
            hint="correct the config.json",
        )
    return [i % period == offset for i in range(decoder.num_layers(config))]
