"""OLMoE: OLMo 2's norms over all queries and keys, before attention, and 64 experts."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import QKNorm
from tightfit.model.blocks.mlp import MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("OlmoeForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """All layers alike."""
    for key in ("attention_bias", "clip_qkv"):
        if config.raw(key):
            raise UnsupportedModelError(f"{key} in OlmoeForCausalLM is not modelled")
    attention = decoder.attention(config, qk_norm=QKNorm.FULL)
    experts = MoE(
        num_experts=config.integer("num_experts", default=64, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=8),
        intermediate_size=config.integer("intermediate_size"),
        activation=config.text("hidden_act", default="silu"),
        renormalize=config.boolean("norm_topk_prob"),
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, experts),
        every_stage_has_ends=True,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
    )
