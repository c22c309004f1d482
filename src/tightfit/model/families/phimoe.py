"""Phi-3.5-MoE: Mixtral's experts, LayerNorms with biases, and biases everywhere else."""

from tightfit.model.blocks.mlp import ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("PhiMoEForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """Two experts are chosen by a sparse mixer of their scores."""
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    bias = config.boolean("attention_bias")
    attention = decoder.attention(
        config,
        default_kv_heads=8,
        default_theta=1_000_000.0,
        window=window,
        qkv_bias=bias,
        output_bias=bias,
    )
    experts = MoE(
        num_experts=config.integer("num_local_experts", default=16, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=2),
        intermediate_size=config.integer("intermediate_size"),
        activation=config.text("hidden_act", default="silu"),
        renormalize=False,
        module="block_sparse_moe",
        names=ExpertNames(
            gate="experts.{expert}.w1.weight",
            up="experts.{expert}.w3.weight",
            down="experts.{expert}.w2.weight",
        ),
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, experts),
        norm_eps=config.number("rms_norm_eps", default=1e-5),
        norm_bias=True,
        head_bias=config.boolean("lm_head_bias"),
        every_stage_has_ends=True,
        unmodelled="experts chosen by a sparse mixer",
    )
