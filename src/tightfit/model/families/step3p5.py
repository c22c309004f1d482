"""Step 3.5 Flash: more heads where attention slides, a gate for each head, and stacked experts.

Source: vLLM's `models/step3p5.py`, which routes in float32, and its config class
(`transformers_utils/configs/step3p5.py`), whose defaults these are.
"""

from collections.abc import Sequence
from typing import Any

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Attention, QKNorm
from tightfit.model.blocks.mlp import ExpertNames, MoE, Routing
from tightfit.model.blocks.output_gate import OutputGate
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec

ARCHITECTURES = ("Step3p5ForCausalLM",)

_STACKED = ExpertNames(
    gate="gate_proj.weight", up="up_proj.weight", down="down_proj.weight", stacked=True
)


def spec(config: Config) -> ModelSpec:
    """The shared expert of a layer is beside its experts, which is where checkpoints name it.

    Raises:
        UnsupportedModelError: an option that vLLM does not serve.
    """
    for key in ("use_moe_router_bias", "need_fp32_gate"):
        if not config.boolean(key, default=True):
            raise UnsupportedModelError(f"Step3p5ForCausalLM without {key} is not modelled")
    kind = config.text("att_impl_type", default="GQA")
    if kind != "GQA":
        raise UnsupportedModelError(f"att_impl_type {kind!r} is not modelled")
    count = decoder.num_layers(config)
    kinds = config.strings("layer_types")[:count]
    if len(kinds) != count:
        raise ConfigError(
            f"{config.name} has {len(kinds)} layer_types for num_hidden_layers = {count}",
            hint="correct the config.json",
        )
    experts, dense = _experts(config), decoder.dense_mlp(config, activation="silu")
    width = config.integer("share_expert_dim", default=experts.intermediate_size * experts.top_k)
    shared = decoder.shared_mlp(width, "silu", module="share_expert")
    assert shared is not None
    sparse, layers = _sparse(config, count), []
    for i, word in enumerate(kinds):
        attention = _attention(config, i, word)
        gated = config.boolean("use_head_wise_attn_gate")
        gate = (OutputGate(attention=attention, name="g_proj", by_head=True),) if gated else ()
        beside = (shared,) if i in sparse else ()
        mlp = experts if i in sparse else dense
        layers.append(Layer(mixers=(attention,), mlp=mlp, extras=(*gate, *beside)))
    alike: dict[Layer, Layer] = {}
    limits = config.raw("swiglu_limits") or config.raw("swiglu_limits_shared")
    return decoder.model(
        config,
        tuple(alike.setdefault(layer, layer) for layer in layers),
        norm_eps=config.number("rms_norm_eps", default=1e-5),
        norm_unit_offset=True,
        ignored_sources=(*decoder.layers_after(config, "num_nextn_predict_layers"), "expert_bias"),
        unmodelled="clamped activations" if limits else None,
        verified_for_sharding=False,
    )


def _attention(config: Config, layer: int, kind: str) -> Attention:
    """The attention of one layer, whose rope is its own."""
    if kind not in ("full_attention", "sliding_attention"):
        raise UnsupportedModelError(f"layer type {kind!r} is not modelled")
    other = config.section("attention_other_setting")
    special = other is not None and other.text("attention_type") == kind
    sizes = other if other is not None and special else config
    heads = sizes.integer("num_attention_heads", default=40)
    theta = _each(config, "rope_theta", layer, 500_000.0)
    only = config.strings("yarn_only_types")
    unscaled = ("rope_scaling",) if only and kind not in only else ()
    own: dict[str, Any] = {
        "rope_theta": theta,
        "partial_rotary_factor": _each(config, "partial_rotary_factors", layer, 1.0),
        "num_attention_heads": heads,
        "num_key_value_heads": sizes.integer("num_attention_groups", default=8),
        "head_dim": sizes.raw("head_dim") or config.raw("head_dim"),
    }
    values = config.without("rope_parameters", *unscaled, *own).with_defaults(own)
    return decoder.attention(
        values,
        qkv_bias=config.boolean("attention_bias"),
        qk_norm=QKNorm.HEAD,
        window=config.integer("sliding_window") if kind == "sliding_attention" else None,
    )


def _each(config: Config, key: str, layer: int, default: float) -> float:
    """A number for all layers, or the layer's own of a list.

    Raises:
        ConfigError: the list is too short.
    """
    given = config.raw(key)
    if not isinstance(given, Sequence) or isinstance(given, str):
        return config.positive(key, default=default)
    numbers = config.numbers(key)
    if layer >= len(numbers):
        raise ConfigError(
            f"{config.name} has {len(numbers)} {key}, and none for layer {layer}",
            hint="correct the config.json",
        )
    return numbers[layer]


def _sparse(config: Config, count: int) -> set[int]:
    """The layers that have experts.

    Raises:
        ConfigError: `moe_layers_enum` does not list layers.
    """
    if not config.has("moe_layers_enum"):
        return set(range(1, count))
    text = config.text("moe_layers_enum")
    try:
        return {int(word) for word in text.split(",")}
    except ValueError:
        raise ConfigError(
            f"{config.name} has moe_layers_enum = {text[:40]!r}, which lists no layers",
            hint="correct the config.json",
        ) from None


def _experts(config: Config) -> MoE:
    return MoE(
        num_experts=config.integer("moe_num_experts", default=16, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("moe_top_k", default=4),
        intermediate_size=config.integer("moe_intermediate_size", default=10_240),
        activation="silu",
        renormalize=config.boolean("norm_expert_weight", default=True),
        module="moe",
        routing=Routing(
            sigmoid=config.text("moe_router_activation", default="softmax") == "sigmoid",
            scale=config.number("moe_router_scaling_factor", default=1.0),
        ),
        router_dtype="F32",
        correction_bias="router_bias",
        names=_STACKED,
    )
