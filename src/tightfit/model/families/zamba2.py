"""Zamba 2: Mamba 2 in every layer, and in some a transformer that they share.

Source: vLLM's `models/zamba2.py`, without pipeline parallelism; the defaults are transformers'.
"""

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.mamba import Mamba2
from tightfit.model.blocks.shared_transformer import SharedAttention, SharedMLP, SharedOutput
from tightfit.model.config import Config
from tightfit.model.families import decoder, hybrid
from tightfit.model.spec import Layer, ModelSpec, Names

ARCHITECTURES = ("Zamba2ForCausalLM",)

_DEFAULTS = {
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "hidden_size": 2560,
    "num_hidden_layers": 54,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
}
_KINDS = {"mamba": "mamba", "linear_attention": "mamba", "hybrid": "hybrid"}
_LONG = 16_384
"""Tokens, where `use_long_context` says so."""


def spec(config: Config) -> ModelSpec:
    """`layers_block_type` says which layers use one of `num_mem_blocks` transformers in turn.

    Raises:
        UnsupportedModelError: grouped KV heads, or a head of its own, which vLLM does not build.
    """
    config = config.with_defaults(_DEFAULTS)
    if not config.boolean("tie_word_embeddings", default=True):
        raise UnsupportedModelError("Zamba2ForCausalLM with a head of its own is not modelled")
    count, shared = decoder.num_layers(config), config.integer("num_mem_blocks", default=1)
    words = config.strings("layers_block_type") or config.strings("layer_types")
    words = words or _published(config, count)
    kinds = hybrid.layer_kinds(config, words, _KINDS, count=count)
    total = kinds.count("hybrid")
    mamba = _mamba(config, "mamba")
    plain = Layer(mixers=(mamba,), mlp=None, norms=("input_layernorm",))
    layers, used = [], 0
    for kind in kinds:
        if kind == "mamba":
            layers.append(plain)
            continue
        adapters = tuple(range(used, total, shared)) if used < shared else ()
        layers.append(_hybrid(config, adapters, owned=used < shared))
        used += 1
    alike: dict[Layer, Layer] = {}
    changes = {"max_position_embeddings": _LONG} if config.boolean("use_long_context") else {}
    return decoder.model(
        config,
        tuple(alike.setdefault(layer, layer) for layer in layers),
        default_tied=True,
        names=Names(norm="model.final_layernorm"),
        unmodelled="a transformer that layers share",
        verified_for_sharding=False,
        **changes,
    )


def _published(config: Config, count: int) -> tuple[str, ...]:
    """The layers of a config that names none: those of Zamba2-2.7B.

    Raises:
        ConfigError: there are more or fewer.
    """
    words: tuple[str, ...] = ("mamba", *(*("mamba",) * 5, "hybrid") * 7)
    words = (*words, *("mamba",) * 4, "hybrid", *("mamba",) * 3, "hybrid", *("mamba",) * 2)
    if len(words) != count:
        raise ConfigError(
            f"{config.name} lacks 'layers_block_type', and has num_hidden_layers = {count}",
            hint="is this the config.json of a complete Hugging Face checkpoint?",
        )
    return words


def _mamba(config: Config, module: str) -> Mamba2:
    inner = config.integer("mamba_expand", default=2) * config.integer("hidden_size")
    heads = config.integer("n_mamba_heads", default=8)
    if inner % heads:
        raise ConfigError(
            f"{config.name} has n_mamba_heads = {heads}, which does not divide {inner} channels",
            hint="correct the config.json",
        )
    return Mamba2(
        num_heads=heads,
        head_dim=inner // heads,
        state_size=config.integer("mamba_d_state", default=64),
        num_groups=config.integer("mamba_ngroups", default=1),
        conv_kernel=config.integer("mamba_d_conv", default=4),
        bias=config.boolean("add_bias_linear"),
        conv_bias=config.boolean("use_conv_bias", default=True),
        module=module,
    )


def _hybrid(config: Config, adapters: tuple[int, ...], *, owned: bool) -> Layer:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.integer("num_key_value_heads", default=heads) != heads:
        raise UnsupportedModelError("num_key_value_heads in Zamba2ForCausalLM is not modelled")
    if 2 * hidden % heads:
        raise ConfigError(
            f"{config.name} has num_attention_heads = {heads}, which does not divide {2 * hidden}",
            hint="correct the config.json",
        )
    size, rank = 2 * hidden // heads, config.integer("adapter_rank", default=128)
    attention = SharedAttention(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=size,
        rope=decoder.rope(config, size) if config.boolean("use_mem_rope") else None,
        scale=(size / 2) ** -0.5,
        module="shared_transformer.self_attn",
        owned=owned,
        adapters=adapters if config.boolean("use_shared_attention_adapter") else (),
        adapter_rank=rank,
    )
    mlp = SharedMLP(
        intermediate_size=config.integer("intermediate_size", default=4 * hidden),
        activation=config.text("hidden_act", default="gelu"),
        bias=config.boolean("add_bias_linear"),
        module="shared_transformer.feed_forward",
        fused="gate_up_proj",
        owned=owned,
        adapters=adapters,
        adapter_rank=rank,
    )
    return Layer(
        mixers=(_mamba(config, "mamba_decoder.mamba"), attention),
        mlp=mlp,
        extras=(SharedOutput(),),
        norms=("mamba_decoder.input_layernorm",),
    )
