"""What nearly all decoder-only families share; a family's own file says only what is different.

The defaults are those of Hugging Face's Llama (`transformers/models/llama`). A family passes what
its config class fills in when a key is absent: head counts, tying, and so on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Attention, Rope
from tightfit.model.blocks.base import Mixer
from tightfit.model.blocks.mlp import DenseMLP, MoE, Routing
from tightfit.model.config import Config
from tightfit.model.spec import Layer, ModelSpec, ropes

MOST_EXPERTS = 10_000
MOST_LAYERS = 1000
"""More than any model has; bounded because every expert is a tensor of its own."""
_MROPE_POSITIONS = 4
"""vLLM's table of a rope for images is so many times as long, for long videos (`mrope.py`)."""
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")


def rope(
    config: Config,
    head_dim: int,
    *,
    default_theta: float = 10_000.0,
    kind: str | None = None,
) -> Rope:
    """Read both spellings: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`.

    `kind` picks one entry of a `rope_parameters` that is keyed by layer type.
    """
    parameters = config.section("rope_parameters")
    if parameters is not None and kind is not None and (nested := parameters.section(kind)):
        parameters = nested
    scaling = parameters or config.section("rope_scaling") or Config({})
    rope_type = scaling.text("rope_type", "type", default="default")
    rope_type = "default" if rope_type == "mrope" else rope_type
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope_type {rope_type!r} is not modelled", hint=f"known: {', '.join(ROPE_TYPES)}"
        )
    kind_of_rope = "longrope" if rope_type == "su" else rope_type
    factors = _rope_factors(scaling, kind_of_rope)
    if rope_type != "default" and "original_max_position_embeddings" not in factors:
        factors["original_max_position_embeddings"] = config.integer(
            "original_max_position_embeddings", "max_position_embeddings", default=2048
        )
    holder = scaling if scaling.has("partial_rotary_factor") else config
    fraction = holder.positive("partial_rotary_factor", default=1.0)
    if fraction > 1:
        raise ConfigError(
            f"{holder.name} has partial_rotary_factor = {fraction}, which is more than the whole",
            hint="correct the config.json",
        )
    holder = scaling if scaling.has("rope_theta") else config
    theta = holder.positive("rope_theta", default=default_theta)
    rotary_dim = int(head_dim * fraction)
    if rotary_dim % 2:
        raise ConfigError(
            f"{config.name} gives rotary embeddings {rotary_dim} features, which cannot be paired",
            hint="correct head_dim or partial_rotary_factor in the config.json",
        )
    return Rope(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling=None if rope_type == "default" else factors,
        max_position_embeddings=config.integer("max_position_embeddings", default=2048)
        * (_MROPE_POSITIONS if scaling.has("mrope_section") else 1),
    )


_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


def _rope_factors(scaling: Config, rope_type: str) -> dict[str, Any]:
    """The factors that are there, and those that the type cannot do without."""
    needed = _NEEDED.get(rope_type, ())
    factors: dict[str, Any] = {"rope_type": rope_type}
    for key in _NUMBERS:
        if scaling.has(key) or key in needed:
            may_be_zero = key.startswith("mscale")
            factors[key] = scaling.number(key) if may_be_zero else scaling.positive(key)
    for key in ("short_factor", "long_factor"):
        if scaling.has(key) or key in needed:
            factors[key] = scaling.numbers(key)
    key = "original_max_position_embeddings"
    if scaling.has(key):
        factors[key] = scaling.integer(key)
    if scaling.has("truncate"):
        factors["truncate"] = scaling.boolean("truncate")
    return factors


def attention(
    config: Config,
    *,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    default_theta: float = 10_000.0,
    scale: float | None = None,
    **changes: Any,
) -> Attention:
    """Full attention as the config gives it; `changes` are fields of `Attention`."""
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", default=default_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{config.name} has num_attention_heads = {num_heads}, which is not a multiple of "
            f"num_key_value_heads = {num_kv_heads}",
            hint="correct the config.json",
        )
    hidden_size = config.integer("hidden_size")
    head_dim = config.integer("head_dim", default=default_head_dim or hidden_size // num_heads or 1)
    return Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=changes.pop("rope", None) or rope(config, head_dim, default_theta=default_theta),
        scale=head_dim**-0.5 if scale is None else scale,
        **changes,
    )


def plain_attention(
    config: Config, *, num_kv_heads: int | None = None, rope: Rope | None = None, **changes: Any
) -> Attention:
    """Attention as before Llama: heads fill the hidden size. `changes` are its fields."""
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("hidden_size") // num_heads or 1
    fields: Mapping[str, Any] = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads or num_heads,
        "head_dim": head_dim,
        "rope": rope,
        "scale": head_dim**-0.5,
    }
    return Attention(**{**fields, **changes})


def num_kv_shared_layers(config: Config, *, default: int) -> int:
    """How many of the last layers read the cache of an earlier one."""
    shared = config.integer("num_kv_shared_layers", default=default, minimum=0)
    count = num_layers(config)
    if shared >= count:
        raise ConfigError(
            f"{config.name} has num_kv_shared_layers = {shared}, and {count} layers in all",
            hint="correct the config.json",
        )
    return shared


def dense_mlp(config: Config, **changes: Any) -> DenseMLP:
    """The gated MLP of a config; `changes` are fields of `DenseMLP`."""
    fields: Mapping[str, Any] = {
        "intermediate_size": config.integer("intermediate_size"),
        "activation": config.text("hidden_activation", "hidden_act", default="silu"),
    }
    return DenseMLP(**{**fields, **changes})


def shared_mlp(
    intermediate_size: int, activation: str, *, module: str = "shared_experts"
) -> DenseMLP | None:
    """The MLP that all tokens of a mixture share, or None where its size is 0."""
    if not intermediate_size:
        return None
    return DenseMLP(intermediate_size=intermediate_size, activation=activation, module=module)


def corrected_routing(config: Config) -> Routing:
    """DeepSeek V3's, as others spell and default it."""
    return Routing(
        sigmoid=True,
        groups=config.integer("n_group", default=1),
        top_groups=config.integer("topk_group", default=1),
        scale=config.number("routed_scaling_factor", default=1.0),
    )


def uniform(config: Config, attention: Mixer, mlp: DenseMLP | MoE) -> tuple[Layer, ...]:
    """All layers alike."""
    layer = Layer(mixers=(attention,), mlp=mlp)
    return (layer,) * num_layers(config)


def mixed(
    config: Config,
    mixers: Sequence[Mixer],
    *,
    dense: DenseMLP,
    sparse: MoE,
    is_sparse: Callable[[int], bool],
) -> tuple[Layer, ...]:
    """Layers with these mixers, of which some have experts; `mlp_layer_types` must say the same.

    Raises:
        UnsupportedModelError: it does not, so that engines would disagree about the model.
    """
    choice = [is_sparse(i) for i in range(len(mixers))]
    kinds = config.strings("mlp_layer_types")
    if kinds and [kind == "sparse" for kind in kinds] != choice:
        raise UnsupportedModelError(
            f"{config.name} has mlp_layer_types that differ from first_k_dense_replace or the "
            "like, which is not modelled"
        )
    alike: dict[tuple[Mixer, bool], Layer] = {}
    return tuple(
        alike.setdefault((mixer, chosen), Layer(mixers=(mixer,), mlp=sparse if chosen else dense))
        for mixer, chosen in zip(mixers, choice, strict=True)
    )


def layers_after(config: Config, *keys: str) -> tuple[str, ...]:
    """Patterns of the layers behind the last, which predict further tokens: not loaded."""
    first = num_layers(config)
    more = max(1, config.integer(*keys, default=1, minimum=0, maximum=100))
    numbers = "|".join(str(first + i) for i in range(more))
    return (rf"(^|\.)layers\.({numbers})\.",)


def num_layers(config: Config) -> int:
    """Decoder layers, bounded so that a corrupt config cannot exhaust memory."""
    count = config.integer("num_hidden_layers")
    if count > MOST_LAYERS:
        raise ConfigError(
            f"{config.name} has num_hidden_layers = {count}, more than any model has",
            hint="correct the config.json",
        )
    return count


def windowed(
    config: Config,
    full: Attention,
    mlp: DenseMLP | MoE,
    *,
    window: int | None,
    is_sliding: Callable[[int], bool],
    sliding_rope: Rope | None = None,
) -> tuple[Layer, ...]:
    """Layers of which some see only `window` tokens: by `layer_types`, else by `is_sliding`."""
    everything = Layer(mixers=(full,), mlp=mlp)
    if window is None:
        return (everything,) * num_layers(config)
    local = replace(full, window=window, rope=sliding_rope or full.rope)
    sliding = Layer(mixers=(local,), mlp=mlp)
    kinds = layer_types(config)
    if kinds:
        choice = [kind == "sliding_attention" for kind in kinds]
    else:
        choice = [is_sliding(i) for i in range(num_layers(config))]
    return tuple(sliding if local_layer else everything for local_layer in choice)


def layer_types(config: Config) -> Sequence[str]:
    """`layer_types`, checked against the number of layers and the kinds that are modelled."""
    kinds = config.strings("layer_types")
    if kinds and len(kinds) != num_layers(config):
        raise ConfigError(
            f"{config.name} has {len(kinds)} layer_types for num_hidden_layers = "
            f"{num_layers(config)}",
            hint="correct the config.json",
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"layer type {kind!r} is not modelled")
    return kinds


def model(config: Config, layers: tuple[Layer, ...], **changes: Any) -> ModelSpec:
    """The rest of a `ModelSpec`; `changes` are its fields."""
    original, found = "original_max_position_embeddings", ropes(layers)
    moves = any((one.scaling or {}).get("rope_type") == "longrope" for one in found)
    fields: Mapping[str, Any] = {
        "original_length": config.integer(original) if moves and config.has(original) else None,
        "architecture": config.strings("architectures")[0],
        "model_type": config.text("model_type", default=""),
        "dtype": config.dtype(),
        "hidden_size": config.integer("hidden_size"),
        "vocab_size": config.integer("vocab_size"),
        "max_position_embeddings": config.integer("max_position_embeddings", default=2048),
        "norm_eps": config.number("rms_norm_eps", default=1e-6),
        "tie_word_embeddings": config.boolean(
            "tie_word_embeddings", default=changes.pop("default_tied", False)
        ),
        "layers": layers,
    }
    return ModelSpec(**{**fields, **changes})
