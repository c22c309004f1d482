"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, many small experts, and a gated shared one."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.mlp import MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.families.qwen2 import window
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("Qwen2MoeForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """Layers are sparse by `decoder_sparse_step`, but for `mlp_only_layers`."""
    size, _ = window(config)
    if size is not None:
        raise UnsupportedModelError(
            f"a sliding window (use_sliding_window, {size}) in Qwen2MoeForCausalLM is not modelled"
        )
    if not config.boolean("qkv_bias", default=True):
        raise UnsupportedModelError("Qwen2MoeForCausalLM without qkv_bias is not modelled")
    attention = decoder.attention(config, default_kv_heads=16, qkv_bias=True)
    activation = config.text("hidden_act", default="silu")
    shared = config.integer("shared_expert_intermediate_size", default=5632, minimum=0)
    experts = MoE(
        num_experts=config.integer("num_experts", default=60, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=4),
        intermediate_size=config.integer("moe_intermediate_size", default=1408),
        activation=activation,
        renormalize=config.boolean("norm_topk_prob"),
        shared=decoder.shared_mlp(shared, activation, module="shared_expert"),
        shared_gate="shared_expert_gate",
    )
    step = config.integer("decoder_sparse_step", default=1)
    dense_layers = set(config.integers("mlp_only_layers"))
    layers = decoder.mixed(
        config,
        (attention,) * decoder.num_layers(config),
        dense=decoder.dense_mlp(config),
        sparse=experts,
        is_sparse=lambda i: i not in dense_layers and (i + 1) % step == 0,
    )
    return decoder.model(config, layers, every_stage_has_ends=True)
