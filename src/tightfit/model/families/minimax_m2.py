"""MiniMax-M2: norms over all heads, of which a rank holds its part, and 256 experts.

Source: vLLM's `models/minimax_m2.py`, which routes in float32; the defaults are transformers'.
"""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import QKNorm
from tightfit.model.blocks.mlp import ExpertNames, MoE, Routing
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("MiniMaxM2ForCausalLM",)

_DEFAULTS = {
    "head_dim": 128,
    "max_position_embeddings": 196_608,
    "rms_norm_eps": 1e-6,
    "num_mtp_modules": 3,
}


def spec(config: Config) -> ModelSpec:
    """`rotary_dim` says how much of a head is rotated."""
    config = config.with_defaults(_DEFAULTS)
    if config.integer("shared_intermediate_size", default=0, minimum=0):
        raise UnsupportedModelError("a shared expert in MiniMaxM2ForCausalLM is not modelled")
    head_dim = config.integer("head_dim")
    rotary_dim = config.integer("rotary_dim", default=head_dim, maximum=head_dim)
    config = config.with_defaults({"partial_rotary_factor": rotary_dim / head_dim})
    attention = decoder.attention(
        config,
        default_kv_heads=8,
        default_theta=5_000_000.0,
        qkv_bias=config.boolean("attention_bias"),
        qk_norm=QKNorm.DEALT,
    )
    biased = config.boolean("use_routing_bias", default=True)
    experts = MoE(
        num_experts=config.integer("num_local_experts", default=256, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=8),
        intermediate_size=config.integer("intermediate_size"),
        activation=config.text("hidden_act", default="silu"),
        renormalize=True,
        module="block_sparse_moe",
        routing=Routing(sigmoid=True),
        router_dtype="F32",
        correction_bias="e_score_correction_bias" if biased else None,
        names=ExpertNames(
            gate="experts.{expert}.w1.weight",
            up="experts.{expert}.w3.weight",
            down="experts.{expert}.w2.weight",
        ),
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, experts),
        ignored_sources=decoder.layers_after(config, "num_mtp_modules"),
        verified_for_sharding=False,
    )
