"""Granite 4 hybrids: Mamba 2 with a few attention layers, and experts beside a shared MLP."""

from dataclasses import replace

from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.mlp import DenseMLP, ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder, hybrid
from tightfit.model.spec import Layer, ModelSpec

ARCHITECTURES = ("GraniteMoeHybridForCausalLM",)

_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "shared_intermediate_size": 1024,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def spec(config: Config) -> ModelSpec:
    """With no experts at all, the shared MLP is an ordinary one: granite-4.0-h-1b."""
    config = config.with_defaults(_DEFAULTS)
    mixers = {
        "mamba": hybrid.granite_mamba(config, module="mamba"),
        "attention": _attention(config),
    }
    words = config.strings("layer_types") or config.strings("layers_block_type")
    count = decoder.num_layers(config)
    kinds = hybrid.layer_kinds(config, words or ["mamba"] * count, hybrid.GRANITE, count=count)
    mlp, extras = _mlps(config)
    layers = {k: Layer(mixers=(m,), mlp=mlp, extras=extras) for k, m in mixers.items()}
    return decoder.model(
        config,
        tuple(layers[kind] for kind in kinds),
        embedding_scale=config.number("embedding_multiplier", default=1.0),
        residual_scale=config.number("residual_multiplier", default=1.0),
        logits_scale=1.0 / (config.number("logits_scaling", default=1.0) or 1.0),
        every_stage_has_ends=True,
        unmodelled=hybrid.limited_steps(config),
    )


def _attention(config: Config) -> Attention:
    bias = config.boolean("attention_bias")
    attention = decoder.attention(
        config,
        scale=config.number("attention_multiplier", default=1.0),
        qkv_bias=bias,
        output_bias=bias,
    )
    if config.raw("position_embedding_type") == "rope":
        return attention
    return replace(attention, rope=None)


def _mlps(config: Config) -> tuple[DenseMLP | MoE | None, tuple[DenseMLP, ...]]:
    activation = config.text("hidden_act", default="silu")
    width = config.integer("shared_intermediate_size", minimum=0)
    shared: tuple[DenseMLP, ...] = ()
    if width:
        shared = (
            DenseMLP(
                intermediate_size=width,
                activation=activation,
                module="shared_mlp",
                fused="input_linear",
                down="output_linear",
            ),
        )
    count = config.integer("num_local_experts", minimum=0, maximum=decoder.MOST_EXPERTS)
    if not count:
        return (shared[0] if shared else None), ()
    experts = MoE(
        num_experts=count,
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("intermediate_size"),
        activation=activation,
        renormalize=True,
        module="block_sparse_moe",
        router="router.layer",
        names=ExpertNames(gate_up="input_linear.weight", down="output_linear.weight", stacked=True),
    )
    return experts, shared
