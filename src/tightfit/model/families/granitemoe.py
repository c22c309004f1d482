"""Granite MoE: Granite's multipliers, experts in two stacked tensors, and perhaps a shared MLP."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.base import Block
from tightfit.model.blocks.mlp import DenseMLP, ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec

ARCHITECTURES = ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM")


def spec(config: Config) -> ModelSpec:
    """`logits_scaling` divides, the other multipliers multiply."""
    architecture = config.strings("architectures")[0]
    if config.boolean("attention_bias"):
        raise UnsupportedModelError(f"attention_bias in {architecture} is not modelled")
    attention = decoder.attention(config, scale=config.number("attention_multiplier", default=1.0))
    activation = config.text("hidden_act", default="silu")
    experts = MoE(
        num_experts=config.integer("num_local_experts", default=8, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=2),
        intermediate_size=config.integer("intermediate_size"),
        activation=activation,
        renormalize=True,
        module="block_sparse_moe",
        router="router.layer",
        names=ExpertNames(gate_up="input_linear.weight", down="output_linear.weight", stacked=True),
    )
    extras: tuple[Block, ...] = ()
    width = config.integer("shared_intermediate_size", default=0, minimum=0)
    if architecture == "GraniteMoeSharedForCausalLM" and width:
        extras = (shared_mlp(width, activation),)
    layer = Layer(mixers=(attention,), mlp=experts, extras=extras)
    return decoder.model(
        config,
        (layer,) * decoder.num_layers(config),
        embedding_scale=config.number("embedding_multiplier", default=1.0),
        every_stage_has_ends=True,
        residual_scale=config.number("residual_multiplier", default=1.0),
        logits_scale=1.0 / (config.number("logits_scaling", default=1.0) or 1.0),
    )


def shared_mlp(width: int, activation: str) -> DenseMLP:
    """The MLP beside the experts, whose gate and up are one tensor."""
    return DenseMLP(
        intermediate_size=width,
        activation=activation,
        module="shared_mlp",
        fused="input_linear",
        down="output_linear",
    )
