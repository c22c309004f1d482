"""K-EXAONE: EXAONE 4's attention with norms before it, and DeepSeek's kind of experts.

Source: vLLM's `models/exaone_moe.py`; the defaults are transformers'.
"""

from dataclasses import replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import QKNorm
from tightfit.model.blocks.mlp import MoE, Routing
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("ExaoneMoeForCausalLM",)

_DEFAULTS = {
    "vocab_size": 102_400,
    "hidden_size": 4096,
    "intermediate_size": 16_384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def spec(config: Config) -> ModelSpec:
    """Full attention knows positions only where no layer slides.

    Raises:
        UnsupportedModelError: a bias, or windows that differ from layer to layer.
    """
    config = config.with_defaults(_DEFAULTS)
    architecture = config.strings("architectures")[0]
    for key in ("attention_bias", "bias", "mlp_bias"):
        if config.boolean(key):
            raise UnsupportedModelError(f"{key} in {architecture} is not modelled")
    if config.has("sliding_windows"):
        raise UnsupportedModelError(f"sliding_windows in {architecture} is not modelled")
    full = decoder.attention(config, default_theta=1_000_000.0, qk_norm=QKNorm.HEAD)
    kinds = _kinds(config)
    if "sliding_attention" in kinds:
        sliding = replace(full, window=config.integer("sliding_window", default=4096))
        full = replace(full, rope=None)
        mixers = tuple(sliding if kind == "sliding_attention" else full for kind in kinds)
    else:
        mixers = (full,) * len(kinds)
    sparse = _sparse(config)
    return decoder.model(
        config,
        decoder.mixed(
            config,
            mixers,
            dense=decoder.dense_mlp(config),
            sparse=_experts(config),
            is_sparse=lambda i: sparse[i],
        ),
        ignored_sources=(r"^mtp\.",),
        unmodelled="clamped activations" if config.has("swiglu_limits") else None,
        verified_for_sharding=False,
    )


def _kinds(config: Config) -> tuple[str, ...]:
    kinds, count = decoder.layer_types(config), decoder.num_layers(config)
    if kinds:
        return tuple(kinds)
    if config.mentions("sliding_window") and not config.has("sliding_window"):
        return ("full_attention",) * count
    pattern = config.raw("sliding_window_pattern", default=4)
    every = len(pattern) if isinstance(pattern, str) else 0
    every = every or config.integer("sliding_window_pattern", default=4)
    return tuple("sliding_attention" if (i + 1) % every else "full_attention" for i in range(count))


def _sparse(config: Config) -> list[bool]:
    """Whether each layer has experts.

    Raises:
        ConfigError: the config names more or fewer layers than there are.
    """
    count = decoder.num_layers(config)
    kinds = config.strings("mlp_layer_types")
    if not kinds:
        first = config.integer("first_k_dense_replace", default=1, minimum=0)
        return [i >= first for i in range(count)]
    if len(kinds) != count:
        raise ConfigError(
            f"{config.name} has {len(kinds)} mlp_layer_types for num_hidden_layers = {count}",
            hint="correct the config.json",
        )
    return [kind == "sparse" for kind in kinds]


def _experts(config: Config) -> MoE:
    width = config.integer("moe_intermediate_size", default=1024)
    activation = config.text("hidden_act", default="silu")
    shared = config.integer("num_shared_experts", default=1, minimum=0)
    return MoE(
        num_experts=config.integer("num_experts", default=64, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=8),
        intermediate_size=width,
        activation=activation,
        renormalize=config.boolean("norm_topk_prob", default=True),
        routing=Routing(
            sigmoid=True,
            groups=config.integer("n_group", default=1),
            top_groups=config.integer("topk_group", default=1),
            scale=config.number("routed_scaling_factor", default=2.5),
        ),
        correction_bias="e_score_correction_bias",
        shared=decoder.shared_mlp(width * shared, activation),
    )
