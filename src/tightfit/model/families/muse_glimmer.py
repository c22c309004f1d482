"""Muse Glimmer: gated attention in windows, whole without a rope in every fourth layer."""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.output_gate import OutputGate
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.families.nested import nested
from tightfit.model.spec import Layer, ModelSpec, NormStyle
from tightfit.model.towers.muse import muse_tower

ARCHITECTURES = ("MuseGlimmerForConditionalGeneration",)

_TEXT = {
    "vocab_size": 202_048,
    "hidden_size": 6656,
    "intermediate_size": 19_968,
    "num_hidden_layers": 52,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_activation": "silu",
    "max_position_embeddings": 131_072,
    "sliding_window": 2048,
    "rms_norm_eps": 1e-5,
}


def spec(config: Config) -> ModelSpec:
    """Norms of queries, keys and embeddings have no weights, so they do not show here."""
    text = _text(config)
    tower = muse_tower(config, text.hidden_size)
    return nested(text, "model.language_model", "lm_head", (tower,))


def _text(config: Config) -> ModelSpec:
    given = config.section("text_config") or Config({}, name=config.name)
    text = given.completed(config, config.strings("architectures")[0]).with_defaults(_TEXT)
    if text.boolean("attention_bias"):
        raise UnsupportedModelError("attention_bias in Muse Glimmer is not modelled")
    count = decoder.num_layers(text)
    kinds = decoder.layer_types(text)
    full = [kind == "full_attention" for kind in kinds]
    full = full or [(count - 1 - i) % 4 == 0 for i in range(count)]
    bases = text.raw("layer_rope_theta")
    if isinstance(bases, list) and [base == 0 for base in bases] != full:
        raise UnsupportedModelError(
            "layers of Muse Glimmer that rotate and see everything are not modelled"
        )
    local = decoder.attention(text, default_theta=500_000.0, window=text.integer("sliding_window"))
    whole = replace(local, rope=None, window=None)
    mlp = decoder.dense_mlp(text)
    layers = {
        is_full: Layer(mixers=(mixer,), mlp=mlp, extras=(OutputGate(attention=mixer),))
        for is_full, mixer in ((True, whole), (False, local))
    }
    return decoder.model(
        text,
        tuple(layers[is_full] for is_full in full),
        norm_style=NormStyle.SANDWICH,
        logits_softcap=text.positive("final_logit_softcapping", default=20.0),
        logits_scale=text.positive("output_multiplier", default=0.19611613513818404),
    )
