"""DBRX: fused queries, keys and values, and experts as rows of three matrices.

Its config has names of its own, and sections for attention and experts.
"""

from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.mlp import ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("DbrxForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """LayerNorms have no bias, and everything has its place in `transformer.blocks`."""
    attn = config.section("attn_config") or Config({}, name=f"{config.name}: attn_config")
    ffn = config.section("ffn_config") or Config({}, name=f"{config.name}: ffn_config")
    config = config.with_defaults(
        {
            "hidden_size": config.integer("d_model", default=2048),
            "num_attention_heads": config.integer("n_heads", default=16),
            "num_hidden_layers": config.integer("n_layers", default=24),
            "max_position_embeddings": config.integer("max_seq_len", default=2048),
            "num_key_value_heads": attn.integer("kv_n_heads", default=1),
            "rope_theta": attn.positive("rope_theta", default=10_000.0),
        }
    )
    act = ffn.raw("ffn_act_fn", default="silu")
    attention = decoder.attention(
        config,
        module="norm_attn_norm.attn",
        names=Projections(fused="Wqkv", output="out_proj"),
    )
    experts = MoE(
        num_experts=ffn.integer("moe_num_experts", default=4, maximum=decoder.MOST_EXPERTS),
        top_k=ffn.integer("moe_top_k", default=1),
        intermediate_size=ffn.integer("ffn_hidden_size", default=3584),
        activation=str(act.get("name", "silu") if isinstance(act, dict) else act),
        renormalize=True,
        module="ffn",
        router="router.layer",
        names=ExpertNames(
            gate="experts.mlp.w1",
            up="experts.mlp.v1",
            down="experts.mlp.w2",
            stacked=True,
            flat=True,
        ),
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, experts),
        norm_eps=1e-5,
        norm_centers=True,
        unmodelled="clip_qkv" if attn.raw("clip_qkv") else None,
        names=Names(
            embedding="transformer.wte",
            layers="transformer.blocks",
            norm="transformer.norm_f",
            layer_norms=("norm_attn_norm.norm_1", "norm_attn_norm.norm_2"),
        ),
        verified_for_sharding=False,
    )
