"""Gemma 4: heads of another size in global layers, keys as values, experts beside an MLP."""

import math
from dataclasses import replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Attention, Projections, QKNorm, Rope
from tightfit.model.blocks.base import Block
from tightfit.model.blocks.mlp import ExpertNames, MoE
from tightfit.model.blocks.per_layer_input import PerLayerInput, per_layer_tables
from tightfit.model.blocks.scales import LayerScalar, RouterScales
from tightfit.model.config import Config
from tightfit.model.families import decoder, text_spec
from tightfit.model.families.nested import nested
from tightfit.model.parameters import NORMS
from tightfit.model.spec import Layer, ModelSpec, NormStyle
from tightfit.model.towers.gemma4 import gemma4_towers

ARCHITECTURES = ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration")

_DEFAULTS = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "max_position_embeddings": 131_072,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 512,
    "tie_word_embeddings": True,
}
IGNORED = (r"\.(in|out)put_(min|max)$",)
"""Buffers of a few elements."""


def spec(config: Config) -> ModelSpec:
    """A decoder, or one with encoders."""
    if config.strings("architectures")[0] == "Gemma4ForCausalLM":
        return _text(config)
    text = text_spec(config, "Gemma4ForCausalLM")
    towers, vision = gemma4_towers(config, text.hidden_size), config.section("vision_config")
    known = _names_are_known(text) and config.raw("audio_config") is None
    known = known and vision is not None and not vision.boolean("use_clipped_linears")
    return nested(text, "model.language_model", "lm_head", towers, verified=known)


def _names_are_known(text: ModelSpec) -> bool:
    """Layers that share a cache are in modules of their own, and bring inputs of each layer."""
    mixers = (mixer for layer in text.layers for mixer in layer.mixers)
    shared = any(isinstance(mixer, Attention) and mixer.shares_cache for mixer in mixers)
    return not text.extras and not shared


def _text(config: Config) -> ModelSpec:
    """The last `num_kv_shared_layers` read the cache of an earlier layer of their kind."""
    config = config.with_defaults(_DEFAULTS)
    if config.raw("use_bidirectional_attention") == "all":
        raise UnsupportedModelError("use_bidirectional_attention = 'all' is not modelled")
    count, hidden = decoder.num_layers(config), config.integer("hidden_size")
    sliding = [kind == "sliding_attention" for kind in decoder.layer_types(config)]
    sliding = sliding or [bool((i + 1) % 6) for i in range(count)]
    sliding[-1] = False
    shared = decoder.num_kv_shared_layers(config, default=0)
    size = config.integer("hidden_size_per_layer_input", default=256, minimum=0)
    extras: tuple[Block, ...] = (LayerScalar(),)
    if size:
        extras += (PerLayerInput(size=size),)
    experts = _experts(config)
    norms = NORMS[NormStyle.SANDWICH]
    if experts is not None:
        extras += (RouterScales(num_experts=experts.num_experts),)
        norms += tuple(f"{side}_feedforward_layernorm_{i}" for side, i in _MOE_NORMS)
    mlp = decoder.dense_mlp(config)
    wide = config.boolean("use_double_wide_mlp")
    double = replace(mlp, intermediate_size=2 * mlp.intermediate_size)
    kinds = {local: _attention(config, sliding=local) for local in (True, False)}
    alike = {
        (local, reads): Layer(
            mixers=(replace(kinds[local], shares_cache=reads),),
            mlp=experts or (double if reads and wide else mlp),
            extras=extras if experts is None else (*extras, double if reads and wide else mlp),
            norms=norms,
        )
        for local in (True, False)
        for reads in (True, False)
    }
    tables = per_layer_tables(
        "model",
        vocab_size=config.integer("vocab_size_per_layer_input", default=262_144),
        num_layers=count,
        size=size,
        hidden_size=hidden,
    )
    return decoder.model(
        config,
        tuple(alike[local, i >= count - shared] for i, local in enumerate(sliding)),
        default_tied=True,
        norm_style=NormStyle.SANDWICH,
        every_stage_has_ends=True,
        embedding_scale=math.sqrt(hidden),
        logits_softcap=None
        if config.raw("final_logit_softcapping") is None
        else config.number("final_logit_softcapping"),
        extras=tuple(tables) if size else (),
        ignored_sources=(*IGNORED, *unused_keys(count - shared, count)),
        verified_for_sharding=False,
    )


def unused_keys(first: int, last: int) -> tuple[str, ...]:
    """Patterns of keys and values that checkpoints hold for layers which use those of others."""
    layers = "|".join(map(str, range(first, last)))
    return (rf"\.layers\.({layers})\.self_attn\.(k_proj|v_proj|k_norm)\.",) if layers else ()


_MOE_NORMS = (("post", 1), ("post", 2), ("pre", 2))


def _attention(config: Config, *, sliding: bool) -> Attention:
    """Global layers have fewer and longer heads, and may use their keys as values."""
    kv_heads, heads = config.integer("num_key_value_heads"), config.integer("num_attention_heads")
    same = config.boolean("attention_k_eq_v") and not sliding
    if same:
        kv_heads = config.integer("num_global_key_value_heads", default=kv_heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{config.name} has num_attention_heads = {heads}, which is not a multiple of "
            f"{kv_heads} KV heads",
            hint="correct the config.json",
        )
    head_dim = config.integer("head_dim" if sliding else "global_head_dim")
    bias = config.boolean("attention_bias")
    return Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=_rope(config, head_dim, sliding=sliding),
        scale=1.0,
        window=config.integer("sliding_window") if sliding else None,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=QKNorm.HEAD,
        names=Projections(value="k_proj") if same else Projections(),
    )


def _rope(config: Config, head_dim: int, *, sliding: bool) -> Rope:
    """`proportional` rope turns a quarter of the features, and its table has zeros for the rest."""
    parameters = config.section("rope_parameters")
    nested = parameters and parameters.section("sliding_attention" if sliding else "full_attention")
    given = nested or Config({}, name=config.name)
    kind = given.text("rope_type", default="default" if sliding else "proportional")
    if kind not in ("default", "proportional"):
        raise UnsupportedModelError(f"rope_type {kind!r} in Gemma 4 is not modelled")
    fraction = given.positive("partial_rotary_factor", default=1.0 if sliding else 0.25)
    theta = given.positive("rope_theta", default=10_000.0 if sliding else 1_000_000.0)
    scaling = None
    if kind == "proportional":
        scaling = {"rope_type": kind, "partial_rotary_factor": fraction}
    return Rope(
        theta=theta,
        rotary_dim=head_dim,
        scaling=scaling,
        max_position_embeddings=config.integer("max_position_embeddings"),
    )


def _experts(config: Config) -> MoE | None:
    """Experts whose tensors are stacked and lie beside the layer's MLP."""
    if not config.boolean("enable_moe_block"):
        return None
    return MoE(
        num_experts=config.integer("num_experts", maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("top_k_experts"),
        intermediate_size=config.integer("moe_intermediate_size", "expert_intermediate_size"),
        activation=config.text("hidden_activation"),
        renormalize=True,
        module="",
        router="router.proj",
        names=ExpertNames(gate_up="experts.gate_up_proj", down="experts.down_proj", stacked=True),
    )
