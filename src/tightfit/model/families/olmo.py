"""OLMo 2 and 3: norms after attention and MLP, and over all of the queries and keys."""

from tightfit.model.blocks.attention import QKNorm, Rope
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, NormStyle

ARCHITECTURES = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


def spec(config: Config) -> ModelSpec:
    """The q and k norms span all heads, so every rank holds them whole; OLMo 3 has windows."""
    third = config.strings("architectures")[0] == "Olmo3ForCausalLM"
    theta = 500_000.0 if third else 10_000.0
    bias = config.boolean("attention_bias")
    attention = decoder.attention(
        config,
        rope=_rope(config, "full_attention", theta) if third else None,
        default_theta=theta,
        qk_norm=QKNorm.FULL,
        qkv_bias=bias,
        output_bias=bias,
    )
    mlp = decoder.dense_mlp(config)
    if third:
        layers = decoder.windowed(
            config,
            attention,
            mlp,
            window=config.integer("sliding_window", default=4096),
            is_sliding=lambda i: bool((i + 1) % 4),
            sliding_rope=_rope(config, "sliding_attention", theta),
        )
    else:
        layers = decoder.uniform(config, attention, mlp)
    return decoder.model(
        config,
        layers,
        norm_style=NormStyle.POST,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
    )


def _rope(config: Config, kind: str, theta: float) -> Rope:
    """Only full layers are scaled, also where an old config says `rope_scaling` for all."""
    heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", default=config.integer("hidden_size") // heads or 1)
    rope = decoder.rope(config, head_dim, default_theta=theta, kind=kind)
    old = config.section("rope_parameters") is None
    if kind == "sliding_attention" and old:
        return Rope(
            theta=rope.theta,
            rotary_dim=rope.rotary_dim,
            max_position_embeddings=rope.max_position_embeddings,
        )
    return rope
