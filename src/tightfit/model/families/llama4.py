"""Llama 4 (text): chunks of attention, layers without a rope that see everything, and experts.

Norms of queries and keys have no weights, and the temperature of layers without a rope is a scalar,
so neither shows here. Sources: vLLM's `models/llama4.py`; the defaults are transformers'.
"""

from dataclasses import replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.mlp import DenseMLP, ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("Llama4ForCausalLM",)

_DEFAULTS = {
    "vocab_size": 202_048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16_384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
}


def spec(config: Config) -> ModelSpec:
    """Every fourth layer has no rope; the others see only their own chunk."""
    unchunked = config.mentions("attention_chunk_size") and not config.has("attention_chunk_size")
    config = config.with_defaults(_DEFAULTS)
    if config.boolean("attention_bias"):
        raise UnsupportedModelError("attention_bias in Llama4ForCausalLM is not modelled")
    count = decoder.num_layers(config)
    full = replace(decoder.attention(config, default_theta=500_000.0, split_pairs=True), rope=None)
    chunk = None if unchunked else config.integer("attention_chunk_size", default=8192)
    local = decoder.attention(config, default_theta=500_000.0, chunk=chunk, split_pairs=True)
    width = config.integer("intermediate_size")
    activation = config.text("hidden_act", default="silu")
    experts = MoE(
        num_experts=config.integer("num_local_experts", default=16, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=1),
        intermediate_size=width,
        activation=activation,
        renormalize=False,
        module="feed_forward",
        router="router",
        names=ExpertNames(
            gate_up="experts.gate_up_proj",
            down="experts.down_proj",
            stacked=True,
            transposed=True,
        ),
        shared=DenseMLP(intermediate_size=width, activation=activation, module="shared_expert"),
    )
    dense = DenseMLP(
        intermediate_size=config.integer("intermediate_size_mlp"),
        activation=activation,
        module="feed_forward",
    )
    step = config.integer("interleave_moe_layer_step", default=1, minimum=0)
    sparse = [step > 0 and (i + 1) % step == 0 for i in range(count)]
    listed = config.integers("moe_layers")
    if listed and [i in listed for i in range(count)] != sparse:
        raise UnsupportedModelError(
            f"{config.name} has moe_layers that differ from interleave_moe_layer_step, "
            "which is not modelled"
        )
    mixers = [local if roped else full for roped in _roped(config, count)]
    layers = decoder.mixed(
        config, mixers, dense=dense, sparse=experts, is_sparse=lambda i: sparse[i]
    )
    return decoder.model(
        config, layers, unmodelled="norms of queries and keys without weights, and a temperature"
    )


def _roped(config: Config, count: int) -> list[bool]:
    """Which layers rotate; `no_rope_layers` has a 1 for those that do."""
    flags = config.integers("no_rope_layers")
    if flags and len(flags) != count:
        raise ConfigError(
            f"{config.name} has {len(flags)} no_rope_layers for num_hidden_layers = {count}",
            hint="correct the config.json",
        )
    interval = config.integer("no_rope_layer_interval", default=4)
    return [bool(flag) for flag in flags] or [(i + 1) % interval != 0 for i in range(count)]
