"""EXAONE 3 and 3.5 (remote code, GPT-2's names around a Llama), and EXAONE 4.

EXAONE 4 normalizes after attention and MLP and each head of queries and keys. In the 32B three
layers of four slide, and only those rotate.
"""

from dataclasses import replace

from tightfit.model.blocks.attention import Attention, Projections, QKNorm
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec, Names, NormStyle

ARCHITECTURES = ("ExaoneForCausalLM", "Exaone4ForCausalLM")

_KEYS = {"num_hidden_layers": "num_layers", "hidden_act": "activation_function"}


def spec(config: Config) -> ModelSpec:
    """Dispatch on the architecture; they share little."""
    if config.strings("architectures")[0] == "Exaone4ForCausalLM":
        return _fourth(config)
    config = config.renamed(
        {"num_hidden_layers": "num_layers", "hidden_act": "activation_function"}
    )
    bias = config.boolean("attention_bias") or config.boolean("bias")
    attention = decoder.attention(
        config,
        qkv_bias=bias,
        output_bias=bias,
        module="attn.attention",
        names=Projections(output="out_proj"),
    )
    mlp = decoder.dense_mlp(
        config, bias=config.boolean("mlp_bias"), gate="c_fc_0", up="c_fc_1", down="c_proj"
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        norm_eps=config.number("layer_norm_epsilon", default=1e-5),
        names=Names(
            embedding="transformer.wte",
            layers="transformer.h",
            norm="transformer.ln_f",
            layer_norms=("ln_1", "ln_2"),
        ),
        ignored_sources=(r"\.rotary\.inv_freq$",),
        verified_for_sharding=False,
    )


def _fourth(config: Config) -> ModelSpec:
    bias = config.boolean("attention_bias") or config.boolean("bias")
    attention = decoder.attention(
        config,
        default_theta=1_000_000.0,
        qk_norm=QKNorm.HEAD,
        qkv_bias=bias,
        output_bias=bias,
    )
    mlp = decoder.dense_mlp(config, bias=config.boolean("mlp_bias"))
    return decoder.model(
        config,
        _layers(config, attention, decoder.uniform(config, attention, mlp)),
        norm_style=NormStyle.POST,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
    )


def _layers(config: Config, full: Attention, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    kinds = decoder.layer_types(config)
    if not config.has("sliding_window") and config.mentions("sliding_window"):
        return layers
    if not kinds:
        pattern = config.raw("sliding_window_pattern", default=4)
        every = len(pattern) if isinstance(pattern, str) else 0
        every = every or config.integer("sliding_window_pattern", default=4)
        kinds = tuple(
            "sliding_attention" if (i + 1) % every else "full_attention" for i in range(len(layers))
        )
    if "sliding_attention" not in kinds:
        return layers
    window = config.integer("sliding_window", default=4096)
    everything = replace(layers[0], mixers=(replace(full, rope=None),))
    sliding = replace(layers[0], mixers=(replace(full, window=window),))
    return tuple(sliding if kind == "sliding_attention" else everything for kind in kinds)
