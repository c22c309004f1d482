"""Nemotron-H and Nemotron 3: every layer is one block, Mamba 2, attention, an MLP, or experts.

The pattern is spelled by letters or by words (vLLM's `nemotron_h.py`, transformers'
`configuration_nemotron_h.py`). MLPs and experts are not gated.
"""

from collections.abc import Mapping
from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.latent_projections import LatentProjections
from tightfit.model.blocks.mamba import Mamba2
from tightfit.model.blocks.mlp import DenseMLP, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder, hybrid
from tightfit.model.families.mamba import BACKBONE
from tightfit.model.spec import Layer, ModelSpec

ARCHITECTURES = ("NemotronHForCausalLM",)

_DEFAULTS = {
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
_LETTERS: Mapping[str, str] = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_WORDS: Mapping[str, str] = {**hybrid.GRANITE, "mlp": "mlp", "moe": "moe"}
_MODULE = "mixer"


def spec(config: Config) -> ModelSpec:
    """Attention has no positions; the state is float32 unless the config says otherwise."""
    config = config.with_defaults(_DEFAULTS)
    if config.has("sliding_window"):
        raise UnsupportedModelError("a sliding_window in NemotronHForCausalLM is not modelled")
    kinds = _kinds(config)
    makers = {"mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _experts}
    layers = {kind: makers[kind](config) for kind in dict.fromkeys(kinds)}
    return decoder.model(
        config,
        tuple(layers[kind] for kind in kinds),
        names=BACKBONE,
        norm_eps=config.positive("layer_norm_epsilon", "norm_eps", default=1e-5),
        ignored_sources=(r"^mtp\.",),
        verified_for_sharding=False,
    )


def _kinds(config: Config) -> tuple[str, ...]:
    """The kind of every layer; `num_hidden_layers` is ignored, as transformers does."""
    words = config.strings("layers_block_type") or config.strings("layer_types")
    if words:
        return hybrid.layer_kinds(config, words, _WORDS, count=None)
    pattern = config.text("hybrid_override_pattern")
    return hybrid.layer_kinds(config, tuple(pattern), _LETTERS, count=None)


def _mamba(config: Config) -> Layer:
    mamba = Mamba2(
        num_heads=config.integer("mamba_num_heads", default=128),
        head_dim=config.integer("mamba_head_dim", default=64),
        state_size=config.integer("ssm_state_size", default=128),
        num_groups=config.integer("mamba_n_groups", "n_groups", default=8),
        conv_kernel=config.integer("mamba_d_conv", "conv_kernel", default=4),
        bias=config.boolean("use_bias"),
        conv_bias=config.boolean("mamba_conv_bias", "use_conv_bias", default=True),
        module=_MODULE,
        ssm_dtype=hybrid.state_dtype(config, "mamba_ssm_cache_dtype", default="float32"),
    )
    return Layer(mixers=(mamba,), mlp=None)


def _attention(config: Config) -> Layer:
    head_dim = config.integer("head_dim", "attention_head_dim", default=128)
    attention = decoder.attention(config, default_head_dim=head_dim, module=_MODULE)
    return Layer(mixers=(replace(attention, rope=None),), mlp=None)


def _mlp(config: Config) -> Layer:
    return Layer(mixers=(), mlp=_dense(config, _MODULE, config.integer("intermediate_size")))


def _dense(config: Config, module: str, intermediate_size: int) -> DenseMLP:
    return DenseMLP(
        intermediate_size=intermediate_size,
        activation=config.text("mlp_hidden_act", default="relu2"),
        bias=config.boolean("mlp_bias"),
        gated=False,
        module=module,
    )


def _experts(config: Config) -> Layer:
    copies = config.integer("n_shared_experts", default=1, minimum=0)
    width = config.integer("moe_shared_expert_intermediate_size", default=7688, minimum=0)
    latent = config.integer("moe_latent_size") if config.has("moe_latent_size") else None
    bias = config.boolean("mlp_bias")
    experts = MoE(
        num_experts=config.integer(
            "n_routed_experts", "num_local_experts", default=8, maximum=decoder.MOST_EXPERTS
        ),
        top_k=config.integer("num_experts_per_tok", default=2),
        intermediate_size=config.integer("moe_intermediate_size", default=7688),
        activation=config.text("mlp_hidden_act", default="relu2"),
        renormalize=config.boolean("norm_topk_prob", default=True),
        module=_MODULE,
        gated=False,
        correction_bias="gate.e_score_correction_bias",
        shared=_dense(config, "shared_experts", copies * width) if copies * width else None,
        latent_size=latent,
    )
    if latent is None:
        return Layer(mixers=(), mlp=experts)
    projections = LatentProjections(
        size=latent, module=_MODULE, down="fc1_latent_proj", up="fc2_latent_proj", bias=bias
    )
    return Layer(mixers=(), mlp=experts, extras=(projections,))
