"""Cohere's Command-R, Aya 23 and Command-R7B: MLP beside attention, a LayerNorm without a bias.

In Cohere 2 three layers of four slide and rotate, the others see everything and have no positions.
Command A+ has experts in all layers but the first ones. vLLM adds one to their windows
(`models/commandr.py`, `models/cohere2_moe.py`).
"""

from dataclasses import replace
from typing import Any

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Attention, QKNorm
from tightfit.model.blocks.mlp import MoE, Routing
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec, Names

ARCHITECTURES = ("CohereForCausalLM", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM")

_DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
}


def spec(config: Config) -> ModelSpec:
    """Command-R+ normalizes queries and keys, with a weight for every feature of every head."""
    if config.strings("architectures")[0] == "Cohere2MoeForCausalLM":
        return _mixture(config.with_defaults({**_DEFAULTS, "head_dim": 128}))
    second = config.strings("architectures")[0] == "Cohere2ForCausalLM"
    config = config.with_defaults(_DEFAULTS)
    if config.boolean("attention_bias"):
        raise UnsupportedModelError("attention_bias in Cohere's models is not modelled")
    attention = _attention(
        config,
        default_theta=10_000.0 if second else 500_000.0,
        qk_norm=QKNorm.MATRIX if config.boolean("use_qk_norm") else QKNorm.NONE,
    )
    mlp = decoder.dense_mlp(config)
    full = decoder.uniform(config, attention, mlp)
    layers = _hybrid(config, attention, full) if second else full
    return _model(config, layers, norm_centers=True)


def _attention(config: Config, **changes: Any) -> Attention:
    attention = decoder.attention(config, **changes)
    assert attention.rope is not None
    return replace(attention, rope=replace(attention.rope, interleaved=True))


def _model(config: Config, layers: tuple[Layer, ...], **changes: Any) -> ModelSpec:
    return decoder.model(
        config,
        layers,
        default_tied=True,
        has_lm_head_module=False,
        norm_eps=config.number("rms_norm_eps", "layer_norm_eps", default=1e-5),
        parallel_residual=True,
        logits_scale=config.number("logit_scale", default=0.0625),
        names=Names(layer_norms=("input_layernorm",)),
        every_stage_has_ends=True,
        **changes,
    )


def _hybrid(config: Config, full: Attention, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    window = config.integer("sliding_window", default=4096)
    everything = replace(layers[0], mixers=(replace(full, rope=None),))
    sliding = replace(layers[0], mixers=(replace(full, window=window, more_window=1),))
    kinds = decoder.layer_types(config)
    if not kinds:
        pattern = config.integer("sliding_window_pattern", "_sliding_window_pattern", default=4)
        kinds = tuple(
            "sliding_attention" if (i + 1) % pattern else "full_attention"
            for i in range(len(layers))
        )
    return tuple(sliding if kind == "sliding_attention" else everything for kind in kinds)


def _mixture(config: Config) -> ModelSpec:
    """Dense layers at the beginning see everything, and rotate unless some of them slide."""
    if config.boolean("attention_bias"):
        raise UnsupportedModelError("attention_bias in Cohere's models is not modelled")
    first = config.integer("first_k_dense_replace", default=0, minimum=0)
    count = decoder.num_layers(config)
    given = config.strings("mlp_layer_types")
    dense = [kind == "dense" for kind in given] or [i < first for i in range(count)]
    kinds = decoder.layer_types(config) or _kinds(config, first, count)
    full = _attention(config)
    window = config.integer("sliding_window", default=4096)
    sliding = replace(full, window=window, more_window=1)
    rotates = config.integer("prefix_dense_sliding_window_pattern", default=1) == 1
    prefix = dense.index(False) if False in dense else count
    mixers = tuple(
        sliding
        if kind == "sliding_attention"
        else replace(full, rope=full.rope if rotates and i < prefix else None)
        for i, kind in enumerate(kinds)
    )
    width = config.integer("intermediate_size")
    layers = decoder.mixed(
        config,
        mixers,
        dense=decoder.dense_mlp(
            config,
            intermediate_size=config.integer("prefix_dense_intermediate_size", default=width),
        ),
        sparse=_experts(config, width),
        is_sparse=lambda i: not (dense[i] if i < len(dense) else False),
    )
    return _model(
        config,
        layers,
        norm_centers=not config.has("rms_norm_eps"),
        unmodelled="experts beside attention",
        verified_for_sharding=False,
    )


def _kinds(config: Config, first: int, count: int) -> tuple[str, ...]:
    """Which layers slide; the dense ones at the beginning have a pattern of their own."""
    patterns = [
        config.integer(key, default=default)
        for key, default in (
            ("prefix_dense_sliding_window_pattern", 1),
            ("sliding_window_pattern", 4),
        )
    ]
    places = [(i, patterns[0]) if i < first else (i - first, patterns[1]) for i in range(count)]
    return tuple(
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i, pattern in places
    )


def _experts(config: Config, width: int) -> MoE:
    activation = config.text("hidden_act", default="silu")
    shared = config.integer("num_shared_experts", default=0, minimum=0)
    chosen = config.text("expert_selection_fn", default="softmax")
    return MoE(
        num_experts=config.integer("num_experts", default=8, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=2),
        intermediate_size=width,
        activation=activation,
        renormalize=config.boolean("norm_topk_prob", default=True),
        routing=Routing(sigmoid=chosen == "sigmoid"),
        shared=decoder.shared_mlp(width * shared, activation),
    )
