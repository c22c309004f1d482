"""LongCat-Flash: two latent attentions and two dense MLPs in a layer, and experts beside them.

Some choices of the router are no experts: a token goes past them. Source: vLLM's
`models/longcat_flash.py`, which routes in float32; the defaults are transformers'.
"""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.mlp import MoE, Routing
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.families.deepseek import latent_attention
from tightfit.model.spec import Layer, ModelSpec, Names

ARCHITECTURES = ("LongcatFlashForCausalLM",)

_DEFAULTS = {
    "vocab_size": 131_072,
    "hidden_size": 6144,
    "num_layers": 28,
    "num_attention_heads": 64,
    "ffn_hidden_size": 12_288,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000_000.0,
    "q_lora_rank": 1536,
}
_TWO = range(2)


def spec(config: Config) -> ModelSpec:
    """`num_layers` counts layers of two attentions each.

    Raises:
        UnsupportedModelError: a bias, a head that vLLM does not tie, or another kind of choice.
    """
    config = config.with_defaults(_DEFAULTS)
    for key in ("attention_bias", "router_bias", "tie_word_embeddings"):
        if config.boolean(key):
            raise UnsupportedModelError(f"{key} in LongcatFlashForCausalLM is not modelled")
    kind = config.text("zero_expert_type", default="identity")
    if kind != "identity":
        raise UnsupportedModelError(f"zero_expert_type {kind!r} is not modelled")
    config = config.without("num_hidden_layers").renamed(
        {"num_hidden_layers": "num_layers", "intermediate_size": "ffn_hidden_size"}
    )
    mlps = tuple(decoder.dense_mlp(config, module=f"mlps.{i}") for i in _TWO)
    layer = Layer(
        mixers=tuple(_attention(config, i) for i in _TWO), mlp=_experts(config), extras=mlps
    )
    names = ("input_layernorm", "post_attention_layernorm")
    return decoder.model(
        config,
        (layer,) * decoder.num_layers(config),
        names=Names(layer_norms=tuple(f"{name}.{i}" for i in _TWO for name in names)),
        ignored_sources=(r"(^|\.)mtp\.", r"\.rotary_emb\.inv_freq$"),
        unmodelled="experts beside two attentions and MLPs",
        verified_for_sharding=False,
    )


def _attention(config: Config, number: int) -> LatentAttention:
    return replace(latent_attention(config), module=f"self_attn.{number}")


def _experts(config: Config) -> MoE:
    zeros = config.integer("zero_expert_num", default=256, minimum=0, maximum=decoder.MOST_EXPERTS)
    return MoE(
        num_experts=config.integer("n_routed_experts", default=512, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("moe_topk", "num_experts_per_tok", default=12),
        intermediate_size=config.integer(
            "expert_ffn_hidden_size", "moe_intermediate_size", default=2048
        ),
        activation=config.text("hidden_act", default="silu"),
        renormalize=config.boolean("norm_topk_prob"),
        routing=Routing(scale=config.number("routed_scaling_factor", default=6.0)),
        router="router.classifier",
        router_dtype="F32",
        correction_bias="router.e_score_correction_bias",
        zero_experts=zeros,
    )
