"""Mixtral: Mistral's attention and eight experts in every layer."""

from tightfit.model.blocks.mlp import ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("MixtralForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """The checkpoint calls gate, down and up `w1`, `w2` and `w3`."""
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    attention = decoder.attention(
        config, default_kv_heads=8, default_theta=1_000_000.0, window=window
    )
    experts = MoE(
        num_experts=config.integer("num_local_experts", default=8, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=2),
        intermediate_size=config.integer("intermediate_size"),
        activation=config.text("hidden_act", default="silu"),
        renormalize=True,
        module="block_sparse_moe",
        names=ExpertNames(
            gate="experts.{expert}.w1.weight",
            up="experts.{expert}.w3.weight",
            down="experts.{expert}.w2.weight",
        ),
    )
    layers = decoder.uniform(config, attention, experts)
    return decoder.model(
        config,
        layers,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
        every_stage_has_ends=True,
    )
