"""Falcon-H1, whose layers have attention and Mamba 2 side by side, and Bamba, which has either."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Attention
from tightfit.model.config import Config
from tightfit.model.families import decoder, hybrid
from tightfit.model.spec import Layer, ModelSpec, Names

ARCHITECTURES = ("FalconH1ForCausalLM", "BambaForCausalLM")

_SHARED = {
    "vocab_size": 128_000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_DEFAULTS = {
    "FalconH1ForCausalLM": {**_SHARED, "max_position_embeddings": 8192, "mamba_d_ssm": 1024},
    "BambaForCausalLM": {**_SHARED, "max_position_embeddings": 262_144},
}
_NAMES = Names(norm="model.final_layernorm", layer_norms=("input_layernorm", "pre_ff_layernorm"))


def spec(config: Config) -> ModelSpec:
    """Bamba's attention rotates half of each head, wherever `attn_layer_indices` puts it."""
    architecture = config.strings("architectures")[0]
    parallel = architecture == "FalconH1ForCausalLM"
    config = config.with_defaults(_DEFAULTS[architecture])
    for key in ("attention_bias", "mlp_bias"):
        if config.boolean(key) and not (key == "mlp_bias" and parallel):
            raise UnsupportedModelError(f"{key} in {architecture} is not modelled")
    layers = _falcon(config) if parallel else _bamba(config)
    return decoder.model(
        config,
        layers,
        names=_NAMES,
        norm_eps=config.positive("rms_norm_eps", default=1e-5),
        verified_for_sharding=parallel,
        unmodelled=hybrid.limited_steps(config),
    )


def _falcon(config: Config) -> tuple[Layer, ...]:
    if config.boolean("projectors_bias") != config.boolean("mamba_proj_bias"):
        raise UnsupportedModelError(
            "projectors_bias other than mamba_proj_bias in FalconH1ForCausalLM is not modelled"
        )
    mamba = hybrid.granite_mamba(
        config,
        module="mamba",
        inner=config.integer("mamba_d_ssm"),
        gated_norm=config.boolean("mamba_rms_norm"),
    )
    attention = decoder.attention(config, default_theta=100_000_000_000.0)
    mlp = decoder.dense_mlp(config, module="feed_forward", bias=config.boolean("mlp_bias"))
    return (Layer(mixers=(mamba, attention), mlp=mlp),) * decoder.num_layers(config)


def _bamba(config: Config) -> tuple[Layer, ...]:
    count = decoder.num_layers(config)
    chosen = set(config.integers("attn_layer_indices"))
    words = config.strings("layer_types") or config.strings("layers_block_type")
    words = words or tuple("attention" if i in chosen else "mamba" for i in range(count))
    kinds = hybrid.layer_kinds(config, words, hybrid.GRANITE, count=count)
    half: Attention = decoder.attention(config.with_defaults({"partial_rotary_factor": 0.5}))
    mixers = {"mamba": hybrid.granite_mamba(config, module="mamba"), "attention": half}
    mlp = decoder.dense_mlp(config, module="feed_forward")
    layers = {kind: Layer(mixers=(mixer,), mlp=mlp) for kind, mixer in mixers.items()}
    return tuple(layers[kind] for kind in kinds)
