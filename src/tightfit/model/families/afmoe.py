"""Arcee's Trinity (AFMoE): gated attention that slides and rotates, but for every fourth layer.

Source: vLLM's `models/afmoe.py`, which routes in float32; the defaults are transformers'.
"""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import QKNorm
from tightfit.model.blocks.mlp import DenseMLP, MoE, Routing
from tightfit.model.blocks.output_gate import OutputGate
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec, Names

ARCHITECTURES = ("AfmoeForCausalLM",)

_DEFAULTS = {
    "vocab_size": 200_192,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 16_384,
    "rms_norm_eps": 1e-5,
}
_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_mlp_layernorm",
    "post_mlp_layernorm",
)


def spec(config: Config) -> ModelSpec:
    """Only layers that slide know positions.

    Raises:
        UnsupportedModelError: a bias, or a head that vLLM does not tie.
    """
    config = config.with_defaults(_DEFAULTS)
    for key in ("attention_bias", "tie_word_embeddings"):
        if config.boolean(key):
            raise UnsupportedModelError(f"{key} in AfmoeForCausalLM is not modelled")
    full = decoder.attention(config, qk_norm=QKNorm.HEAD)
    window = config.integer("sliding_window", default=1024)
    mixers = {
        "full_attention": replace(full, rope=None),
        "sliding_attention": replace(full, window=window),
    }
    count = decoder.num_layers(config)
    every = config.integer("global_attn_every_n_layers", default=4)
    kinds = decoder.layer_types(config) or tuple(
        "sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)
    )
    dense = config.integer("num_dense_layers", default=1, minimum=0)
    mlps: tuple[DenseMLP | MoE, ...] = (decoder.dense_mlp(config), _experts(config))
    gate = OutputGate(attention=full)
    alike = {
        (kind, sparse): Layer(mixers=(mixers[kind],), mlp=mlps[sparse], extras=(gate,))
        for kind in mixers
        for sparse in (False, True)
    }
    scaled = config.boolean("mup_enabled")
    return decoder.model(
        config,
        tuple(alike[kind, i >= dense] for i, kind in enumerate(kinds)),
        embedding_scale=config.integer("hidden_size") ** 0.5 if scaled else 1.0,
        names=Names(layer_norms=_NORMS),
        verified_for_sharding=False,
    )


def _experts(config: Config) -> MoE:
    width = config.integer("moe_intermediate_size", default=1408)
    activation = config.text("hidden_act", default="silu")
    shared = config.integer("num_shared_experts", default=2, minimum=0)
    return MoE(
        num_experts=config.integer("num_experts", default=64, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=6),
        intermediate_size=width,
        activation=activation,
        renormalize=config.boolean("route_norm", default=True),
        routing=Routing(
            sigmoid=config.text("score_func", default="sigmoid") == "sigmoid",
            groups=config.integer("n_group", default=1),
            top_groups=config.integer("topk_group", default=1),
            scale=config.number("route_scale", default=1.0),
        ),
        router="router.gate",
        router_dtype="F32",
        correction_bias="expert_bias",
        shared=decoder.shared_mlp(width * shared, activation),
    )
