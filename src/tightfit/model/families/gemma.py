"""Gemma 1, 2 and 3 (text): tied and scaled embeddings; from 2 on sandwich norms and windows."""

import math
from dataclasses import replace

from tightfit.model.blocks.attention import QKNorm, Rope
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, NormStyle

ARCHITECTURES = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")

_THIRD = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "hidden_activation": "gelu_pytorch_tanh",
}
"""Of `Gemma3TextConfig`: the first configs of the multimodal models say little."""


def spec(config: Config) -> ModelSpec:
    """Gemma 2 slides every other layer; Gemma 3 all but every sixth, with a rope of their own."""
    if config.strings("architectures")[0] == "GemmaForCausalLM":
        return _first(config)
    third = config.strings("architectures")[0] == "Gemma3ForCausalLM"
    config = config.with_defaults(_THIRD) if third else config
    head_dim = config.integer("head_dim", default=256)
    bias = config.boolean("attention_bias")
    softcaps = config.raw("attn_logit_softcapping", default=None if third else 50.0)
    attention = decoder.attention(
        config,
        default_kv_heads=4,
        default_head_dim=256,
        scale=config.positive("query_pre_attn_scalar", default=256) ** -0.5,
        rope=decoder.rope(
            config,
            head_dim,
            default_theta=1_000_000.0 if third else 10_000.0,
            kind="full_attention",
        ),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=QKNorm.HEAD if third else QKNorm.NONE,
        softcap=None if softcaps is None else config.number("attn_logit_softcapping", default=50.0),
    )
    pattern = config.integer("sliding_window_pattern", "_sliding_window_pattern", default=6)
    layers = decoder.windowed(
        config,
        attention,
        decoder.dense_mlp(config),
        window=config.integer("sliding_window", default=4096),
        is_sliding=(lambda i: bool((i + 1) % pattern)) if third else (lambda i: i % 2 == 0),
        sliding_rope=_local_rope(config, head_dim) if third else None,
    )
    caps = config.raw("final_logit_softcapping", default=None if third else 30.0)
    hidden_size = config.integer("hidden_size")
    return decoder.model(
        config,
        layers,
        default_tied=True,
        norm_style=NormStyle.SANDWICH,
        norm_unit_offset=True,
        has_lm_head_module=third,
        every_stage_has_ends=True,
        embedding_scale=math.sqrt(hidden_size),
        logits_softcap=None
        if caps is None
        else config.number("final_logit_softcapping", default=30.0),
        max_position_embeddings=config.integer(
            "max_position_embeddings", default=131_072 if third else 8192
        ),
    )


def _local_rope(config: Config, head_dim: int) -> Rope:
    """Sliding layers rotate with their own base and are never scaled."""
    parameters = config.section("rope_parameters")
    if parameters is not None and parameters.section("sliding_attention") is not None:
        return decoder.rope(config, head_dim, kind="sliding_attention")
    return Rope(
        theta=config.number("rope_local_base_freq", default=10_000.0),
        rotary_dim=head_dim,
        max_position_embeddings=config.integer("max_position_embeddings", default=131_072),
    )


def _first(config: Config) -> ModelSpec:
    """Gemma 1: a Llama with Gemma's norms and embeddings."""
    bias = config.boolean("attention_bias")
    attention = decoder.attention(
        config, default_kv_heads=16, default_head_dim=256, qkv_bias=bias, output_bias=bias
    )
    # The first configs say "gelu" and mean the approximation, as transformers knows.
    mlp = replace(decoder.dense_mlp(config), activation="gelu_pytorch_tanh")
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        default_tied=True,
        norm_unit_offset=True,
        every_stage_has_ends=True,
        embedding_scale=math.sqrt(config.integer("hidden_size")),
        max_position_embeddings=config.integer("max_position_embeddings", default=8192),
    )
