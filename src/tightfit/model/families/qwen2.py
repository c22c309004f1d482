"""Qwen2 and Qwen2.5: biases on queries, keys and values, none on the output."""

from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("Qwen2ForCausalLM",)


def window(config: Config) -> tuple[int | None, int]:
    """The sliding window when it is switched on, and the first layer that uses it."""
    if not config.boolean("use_sliding_window") or not config.has("sliding_window"):
        return None, 0
    return config.integer("sliding_window"), config.integer(
        "max_window_layers", default=28, minimum=0
    )


def spec(config: Config) -> ModelSpec:
    """Layers from `max_window_layers` on slide if `use_sliding_window` says so."""
    attention = decoder.attention(config, default_kv_heads=32, qkv_bias=True)
    size, first = window(config)
    layers = decoder.windowed(
        config,
        attention,
        decoder.dense_mlp(config),
        window=size,
        is_sliding=lambda i: i >= first,
    )
    return decoder.model(config, layers)
