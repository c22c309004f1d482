"""Mamba, Falcon-Mamba and Mamba 2: no attention, and no MLPs."""

from tightfit.errors import ConfigError
from tightfit.model.blocks.mamba import Mamba1, Mamba2
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec, Names

ARCHITECTURES = ("MambaForCausalLM", "FalconMambaForCausalLM", "Mamba2ForCausalLM")

BACKBONE = Names(
    embedding="backbone.embeddings",
    layers="backbone.layers",
    norm="backbone.norm_f",
    layer_norms=("norm",),
)


def spec(config: Config) -> ModelSpec:
    """The config has no length; vLLM serves such models with 2048 tokens unless told otherwise."""
    second = config.strings("architectures")[0] == "Mamba2ForCausalLM"
    layer = Layer(mixers=(_second(config) if second else _first(config),), mlp=None)
    return decoder.model(
        config,
        (layer,) * decoder.num_layers(config),
        names=BACKBONE,
        norm_eps=config.positive("layer_norm_epsilon", default=1e-5),
        default_tied=not second,
        length_is_free=not config.has("max_position_embeddings"),
        every_stage_has_norm=None if second else True,
    )


def _first(config: Config) -> Mamba1:
    hidden_size = config.integer("hidden_size")
    return Mamba1(
        intermediate_size=config.integer("intermediate_size", default=_expanded(config)),
        state_size=config.integer("state_size", default=16),
        conv_kernel=config.integer("conv_kernel", default=4),
        time_step_rank=time_step_rank(config, "time_step_rank", hidden_size),
        bias=config.boolean("use_bias"),
        conv_bias=config.boolean("use_conv_bias", default=True),
    )


def _second(config: Config) -> Mamba2:
    num_heads = config.integer("num_heads", default=128)
    head_dim = config.integer("head_dim", default=64)
    if num_heads * head_dim != _expanded(config):
        raise ConfigError(
            f"{config.name} has num_heads x head_dim = {num_heads * head_dim}, which is not "
            f"expand x hidden_size = {_expanded(config)}",
            hint="correct the config.json",
        )
    return Mamba2(
        num_heads=num_heads,
        head_dim=head_dim,
        state_size=config.integer("state_size", default=128),
        num_groups=config.integer("n_groups", default=8),
        conv_kernel=config.integer("conv_kernel", default=4),
        bias=config.boolean("use_bias"),
        conv_bias=config.boolean("use_conv_bias", default=True),
    )


def _expanded(config: Config) -> int:
    return int(config.positive("expand", default=2) * config.integer("hidden_size"))


def time_step_rank(config: Config, key: str, hidden_size: int) -> int:
    """The rank of the time step's projection; `auto` is a sixteenth of the hidden size."""
    if config.raw(key, default="auto") == "auto":
        return -(-hidden_size // 16)
    return config.integer(key)
