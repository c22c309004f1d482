"""Models that are a Llama but for an option or a default, one function for each."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Attention, Projections, QKNorm
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec, Names

ARCHITECTURES = (
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "ArceeForCausalLM",
    "Ernie4_5ForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "HeliumForCausalLM",
    "MiniCPMForCausalLM",
    "SolarForCausalLM",
    "OrionForCausalLM",
    "OlmoForCausalLM",
    "CwmForCausalLM",
    "HyperCLOVAXForCausalLM",
    "TeleFLMForCausalLM",
)

# Others are unknown to vLLM 0.32, or hold what is not described here.
_VERIFIED = (
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "ArceeForCausalLM",
    "Ernie4_5ForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "HeliumForCausalLM",
    "OlmoForCausalLM",
    "CwmForCausalLM",
    "HyperCLOVAXForCausalLM",
)


def spec(config: Config) -> ModelSpec:
    """Dispatch on the architecture."""
    architecture = config.strings("architectures")[0]
    return replace(_SPECS[architecture](config), verified_for_sharding=architecture in _VERIFIED)


def _interleaved(attention: Attention) -> Attention:
    assert attention.rope is not None
    return replace(attention, rope=replace(attention.rope, interleaved=True))


def _seed_oss(config: Config) -> ModelSpec:
    """Biases on queries, keys and values."""
    attention = decoder.attention(
        config,
        default_head_dim=128,
        qkv_bias=config.boolean("attention_bias", default=True),
        output_bias=config.boolean("attention_out_bias"),
    )
    mlp = decoder.dense_mlp(config, bias=config.boolean("mlp_bias"))
    return decoder.model(config, decoder.uniform(config, attention, mlp))


def _smollm3(config: Config) -> ModelSpec:
    """Every fourth layer has no positions, and may slide."""
    config = config.with_defaults({"num_key_value_heads": 4, "max_position_embeddings": 32768})
    bias = config.boolean("attention_bias")
    rotated = decoder.attention(config, default_theta=2_000_000.0, qkv_bias=bias, output_bias=bias)
    mlp = decoder.dense_mlp(config, bias=config.boolean("mlp_bias"))
    count = decoder.num_layers(config)
    interval = config.integer("no_rope_layer_interval", default=4)
    has_rope = config.integers("no_rope_layers") or tuple(
        int((i + 1) % interval != 0) for i in range(count)
    )
    window = None
    if config.boolean("use_sliding_window") and config.has("sliding_window"):
        window = config.integer("sliding_window")
    kinds = decoder.layer_types(config) or tuple(
        "full_attention" if rope or window is None else "sliding_attention" for rope in has_rope
    )
    if len(has_rope) != count:
        raise UnsupportedModelError(
            f"{config.name} has {len(has_rope)} no_rope_layers for num_hidden_layers = {count}"
        )
    layers: dict[tuple[int, str], Layer] = {}
    for pair in set(zip(has_rope, kinds, strict=True)):
        mixer = replace(
            rotated,
            rope=rotated.rope if pair[0] else None,
            window=window if pair[1] == "sliding_attention" else None,
        )
        layers[pair] = Layer(mixers=(mixer,), mlp=mlp)
    found = tuple(layers[pair] for pair in zip(has_rope, kinds, strict=True))
    return decoder.model(config, found, default_tied=True)


def _arcee(config: Config) -> ModelSpec:
    """Squared ReLU without a gate."""
    bias = config.boolean("attention_bias")
    attention = decoder.attention(config, qkv_bias=bias, output_bias=bias)
    mlp = decoder.dense_mlp(
        config.with_defaults({"hidden_act": "relu2"}),
        bias=config.boolean("mlp_bias"),
        gated=False,
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        norm_eps=config.number("rms_norm_eps", default=1e-5),
    )


def _ernie(config: Config) -> ModelSpec:
    """Neighbouring features are rotated."""
    bias = config.boolean("use_bias")
    attention = decoder.attention(
        config,
        default_kv_heads=2,
        default_head_dim=128,
        default_theta=500_000.0,
        qkv_bias=bias,
        output_bias=bias,
    )
    return decoder.model(
        config,
        decoder.uniform(config, _interleaved(attention), decoder.dense_mlp(config, bias=bias)),
        default_tied=True,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
    )


def _hunyuan(config: Config) -> ModelSpec:
    """Norms of each head, after the rotation. Its rope scales by `alpha`, which changes no size."""
    bias = config.boolean("attention_bias")
    scaling = config.raw("rope_parameters", "rope_scaling")
    if isinstance(scaling, Mapping) and "alpha" in scaling:
        config = config.without("rope_scaling", "rope_parameters")
    attention = decoder.attention(
        config,
        qk_norm=QKNorm.HEAD,
        norms_after_rope=True,
        qkv_bias=bias,
        output_bias=bias,
        names=Projections(query_norm="query_layernorm", key_norm="key_layernorm"),
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, decoder.dense_mlp(config)),
        norm_eps=config.number("rms_norm_eps", default=1e-5),
    )


def _helium(config: Config) -> ModelSpec:
    bias = config.boolean("attention_bias")
    attention = decoder.attention(
        config,
        default_head_dim=128,
        default_theta=100_000.0,
        qkv_bias=bias,
        output_bias=bias,
    )
    mlp = decoder.dense_mlp(config, bias=config.boolean("mlp_bias"))
    return decoder.model(
        config,
        decoder.uniform(config, _interleaved(attention), mlp),
        norm_eps=config.number("rms_norm_eps", default=1e-8),
    )


def _minicpm(config: Config) -> ModelSpec:
    """MiniCPM 1, 2 and 4: three scales. vLLM ignores the sparse attention of 4.1."""
    if config.integer("num_experts", default=0, minimum=0):
        raise UnsupportedModelError("experts in MiniCPMForCausalLM are not modelled")
    attention = decoder.attention(config)
    layers = decoder.uniform(config, attention, decoder.dense_mlp(config))
    return decoder.model(
        config,
        layers,
        default_tied=True,
        embedding_scale=config.number("scale_emb", default=1.0),
        residual_scale=config.number("scale_depth", default=1.0) / len(layers) ** 0.5,
        logits_scale=config.positive("dim_model_base", default=1.0) / config.integer("hidden_size"),
        every_stage_has_ends=True,
    )


def _solar(config: Config) -> ModelSpec:
    """Solar Pro: some layers read the states of earlier ones, which costs no parameters."""
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    bias = config.boolean("attention_bias") or config.boolean("bias")
    attention = decoder.attention(config, window=window, qkv_bias=bias, output_bias=bias)
    mlp = decoder.dense_mlp(config, bias=config.boolean("mlp_bias"))
    names = Names(layer_norms=("input_layernorm", "post_attention_layernorm"))
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        names=names,
        unmodelled="layers that read the states of earlier ones",
    )


def _orion(config: Config) -> ModelSpec:
    """LayerNorms with a bias."""
    layers = decoder.uniform(config, decoder.attention(config), decoder.dense_mlp(config))
    return decoder.model(config, layers, norm_bias=True, every_stage_has_ends=True)


def _olmo(config: Config) -> ModelSpec:
    """OLMo 1: norms without parameters."""
    bias = config.boolean("attention_bias")
    attention = decoder.attention(config, qkv_bias=bias, output_bias=bias)
    return decoder.model(
        config,
        decoder.uniform(config, attention, decoder.dense_mlp(config)),
        norm_eps=1e-5,
        norm_centers=True,
        norm_weights=False,
        names=Names(norm=None, layer_norms=()),
        unmodelled="clip_qkv" if config.raw("clip_qkv") else None,
    )


def _cwm(config: Config) -> ModelSpec:
    """Code World Model: three layers of four slide, the first of each four does not."""
    config = config.with_defaults({"head_dim": 128, "num_key_value_heads": 8})
    layers = decoder.windowed(
        config,
        decoder.attention(config, default_theta=1_000_000.0),
        decoder.dense_mlp(config, bias=config.boolean("mlp_bias")),
        window=config.integer("sliding_window", default=8192),
        is_sliding=lambda i: bool(i % 4),
    )
    return decoder.model(config, layers, norm_eps=config.number("rms_norm_eps", default=1e-5))


def _hyperclovax(config: Config) -> ModelSpec:
    """HyperCLOVA X: four multipliers, and norms after attention and MLP as well."""
    bias = config.boolean("attention_bias")
    attention = decoder.attention(config, qkv_bias=bias, output_bias=bias)
    scale = config.number("attention_multiplier", default=attention.scale)
    mlp = decoder.dense_mlp(config, bias=config.boolean("mlp_bias"))
    norms = ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2")
    post = config.boolean("use_post_norm", default=True)
    return decoder.model(
        config,
        decoder.uniform(config, replace(attention, scale=scale), mlp),
        names=Names(layer_norms=norms if post else norms[::2]),
        embedding_scale=config.number("embedding_multiplier", default=1.0),
        residual_scale=config.number("residual_multiplier", default=1.0),
        logits_scale=config.number("logits_scaling", default=1.0),
    )


def _teleflm(config: Config) -> ModelSpec:
    """Tele-FLM and FLM-2: a Llama whose widths were scaled by muP, which scales its logits."""
    bias = config.boolean("attention_bias") or config.boolean("bias")
    attention = decoder.attention(config, qkv_bias=bias, output_bias=bias)
    mlp = decoder.dense_mlp(config, bias=config.boolean("mlp_bias"))
    scale = 1.0
    if config.boolean("use_mup"):
        scale = config.positive("output_mult") / config.positive("mup_scale_factor")
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        logits_scale=scale,
        unmodelled="muP" if config.boolean("use_mup") else None,
    )


_SPECS: Mapping[str, Callable[[Config], ModelSpec]] = {
    "SeedOssForCausalLM": _seed_oss,
    "SmolLM3ForCausalLM": _smollm3,
    "ArceeForCausalLM": _arcee,
    "Ernie4_5ForCausalLM": _ernie,
    "HunYuanDenseV1ForCausalLM": _hunyuan,
    "HeliumForCausalLM": _helium,
    "MiniCPMForCausalLM": _minicpm,
    "SolarForCausalLM": _solar,
    "OrionForCausalLM": _orion,
    "OlmoForCausalLM": _olmo,
    "CwmForCausalLM": _cwm,
    "HyperCLOVAXForCausalLM": _hyperclovax,
    "TeleFLMForCausalLM": _teleflm,
}
