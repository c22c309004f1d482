"""Qwen3, dense and mixture of experts: per-head norms of queries and keys, no attention bias."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Attention, QKNorm
from tightfit.model.blocks.mlp import MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.families.qwen2 import window
from tightfit.model.spec import Layer, ModelSpec

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def spec(config: Config) -> ModelSpec:
    """Dispatch on the architecture; the attention is the same."""
    bias = config.boolean("attention_bias")
    moe = config.strings("architectures")[0] == "Qwen3MoeForCausalLM"
    attention = decoder.attention(
        config,
        default_kv_heads=4 if moe else 32,
        default_head_dim=None if moe else 128,
        qk_norm=QKNorm.HEAD,
        qkv_bias=bias,
        output_bias=bias,
    )
    size, first = window(config)
    if moe and size is not None:
        raise UnsupportedModelError(
            f"a sliding window (use_sliding_window, {size}) in Qwen3MoeForCausalLM is not modelled"
        )
    if moe:
        return decoder.model(config, _moe_layers(config, attention), every_stage_has_ends=True)
    layers = decoder.windowed(
        config,
        attention,
        decoder.dense_mlp(config),
        window=size,
        is_sliding=lambda i: i >= first,
    )
    return decoder.model(config, layers)


def _moe_layers(config: Config, attention: Attention) -> tuple[Layer, ...]:
    experts = MoE(
        num_experts=config.integer(
            "num_experts", "num_local_experts", default=128, maximum=decoder.MOST_EXPERTS
        ),
        top_k=config.integer("num_experts_per_tok", default=8),
        intermediate_size=config.integer("moe_intermediate_size", default=768),
        activation=config.text("hidden_act", default="silu"),
        renormalize=config.boolean("norm_topk_prob"),
    )
    sparse = Layer(mixers=(attention,), mlp=experts)
    step = config.integer("decoder_sparse_step", default=1)
    dense_layers = set(config.integers("mlp_only_layers"))
    count = decoder.num_layers(config)
    if step == 1 and not dense_layers:
        return (sparse,) * count
    dense = Layer(mixers=(attention,), mlp=decoder.dense_mlp(config))
    return tuple(dense if i in dense_layers or (i + 1) % step else sparse for i in range(count))
