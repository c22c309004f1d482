"""Cohere's Command-R, Aya 23 and Command-R7B: MLP beside attention, a LayerNorm without a bias.

In Cohere 2 three layers of four slide and rotate, the others see everything and have no positions.
vLLM adds one to their window (`models/commandr.py`).
"""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Attention, QKNorm
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec, Names

ARCHITECTURES = ("CohereForCausalLM", "Cohere2ForCausalLM")

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
    second = config.strings("architectures")[0] == "Cohere2ForCausalLM"
    config = config.with_defaults(_DEFAULTS)
    if config.boolean("attention_bias"):
        raise UnsupportedModelError("attention_bias in Cohere's models is not modelled")
    attention = decoder.attention(
        config,
        default_theta=10_000.0 if second else 500_000.0,
        qk_norm=QKNorm.MATRIX if config.boolean("use_qk_norm") else QKNorm.NONE,
    )
    assert attention.rope is not None
    attention = replace(attention, rope=replace(attention.rope, interleaved=True))
    mlp = decoder.dense_mlp(config)
    full = decoder.uniform(config, attention, mlp)
    return decoder.model(
        config,
        _hybrid(config, attention, full) if second else full,
        default_tied=True,
        has_lm_head_module=False,
        norm_eps=config.number("rms_norm_eps", "layer_norm_eps", default=1e-5),
        logits_scale=config.number("logit_scale", default=0.0625),
        names=Names(layer_norms=("input_layernorm",)),
        every_stage_has_ends=True,
    )


def _hybrid(config: Config, full: Attention, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    window = config.integer("sliding_window", default=4096) + 1
    everything = replace(layers[0], mixers=(replace(full, rope=None),))
    sliding = replace(layers[0], mixers=(replace(full, window=window),))
    kinds = decoder.layer_types(config)
    if not kinds:
        pattern = config.integer("sliding_window_pattern", "_sliding_window_pattern", default=4)
        kinds = tuple(
            "sliding_attention" if (i + 1) % pattern else "full_attention"
            for i in range(len(layers))
        )
    return tuple(sliding if kind == "sliding_attention" else everything for kind in kinds)
