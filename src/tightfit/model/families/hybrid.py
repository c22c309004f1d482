"""What hybrids share: a word or letter for every layer says what mixes its tokens."""

from collections.abc import Mapping, Sequence

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.mamba import Mamba2
from tightfit.model.config import Config
from tightfit.units import TORCH_DTYPES

MOST_LAYERS = 10_000
GRANITE: Mapping[str, str] = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
}
"""The words of IBM's configs, and transformers 5's for the same."""


def layer_kinds(
    config: Config, words: Sequence[str], known: Mapping[str, str], *, count: int | None
) -> tuple[str, ...]:
    """Translate the words of a config, one for each of `count` layers.

    Raises:
        ConfigError: their number is another one, or impossible.
        UnsupportedModelError: a word is unknown.
    """
    if count is not None and len(words) != count:
        raise ConfigError(
            f"{config.name} names the types of {len(words)} layers, and has "
            f"num_hidden_layers = {count}",
            hint="correct the config.json",
        )
    if not 0 < len(words) <= MOST_LAYERS:
        raise ConfigError(
            f"{config.name} names the types of {len(words)} layers", hint="correct the config.json"
        )
    for word in words:
        if word not in known:
            raise UnsupportedModelError(
                f"layer type {word[:40]!r} is not modelled", hint=f"known: {', '.join(known)}"
            )
    return tuple(known[word] for word in words)


def every(config: Config, *, default: int) -> list[str]:
    """Full attention in every `full_attention_interval`-th layer, linear attention elsewhere."""
    interval = config.integer("full_attention_interval", default=default)
    count = config.integer("num_hidden_layers", maximum=MOST_LAYERS)
    return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]


def granite_mamba(
    config: Config, *, module: str, inner: int | None = None, gated_norm: bool = True
) -> Mamba2:
    """Mamba 2 as the configs of Granite, Bamba and Falcon-H1 spell it.

    Raises:
        ConfigError: the heads do not make up the inner width.
    """
    if inner is None:
        inner = config.integer("mamba_expand", default=2) * config.integer("hidden_size")
    heads = config.integer("mamba_n_heads", default=128)
    automatic = config.raw("mamba_d_head", default="auto") == "auto"
    head_dim = inner // heads or 1 if automatic else config.integer("mamba_d_head")
    if heads * head_dim != inner:
        raise ConfigError(
            f"{config.name} has mamba_n_heads x mamba_d_head = {heads * head_dim}, and "
            f"{inner} channels",
            hint="correct the config.json",
        )
    return Mamba2(
        num_heads=heads,
        head_dim=head_dim,
        state_size=config.integer("mamba_d_state", default=256),
        num_groups=config.integer("mamba_n_groups", default=1),
        conv_kernel=config.integer("mamba_d_conv", default=4),
        bias=config.boolean("mamba_proj_bias"),
        conv_bias=config.boolean("mamba_conv_bias", default=True),
        gated_norm=gated_norm,
        module=module,
    )


def limited_steps(config: Config) -> str | None:
    """Whether time steps are clamped, which changes no size and is not described."""
    limit = config.raw("time_step_limit")
    if limit is None or any(limit == [0.0, infinity] for infinity in _INFINITY):
        return None
    return f"time steps within the limits {str(limit)[:40]}"


_INFINITY = (float("inf"), {"__float__": "Infinity"})
"""How transformers writes it, before and since version 5."""


def state_dtype(config: Config, key: str, **default: str) -> str:
    """The dtype of a recurrent state in safetensors' spelling.

    Raises:
        ConfigError: it is unknown.
    """
    dtype = config.text(key, **default).removeprefix("torch.")
    if dtype not in TORCH_DTYPES:
        raise ConfigError(
            f"{config.name} has {key} = {dtype[:40]!r}",
            hint=f"it should be one of {', '.join(TORCH_DTYPES)}",
        )
    return TORCH_DTYPES[dtype]
