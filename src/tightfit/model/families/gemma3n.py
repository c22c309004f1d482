"""Gemma 3n: parallel hidden states, embeddings for every layer, layers that share a cache."""

import math
from dataclasses import replace

from tightfit.errors import ConfigError
from tightfit.model.blocks.altup import AltUp, Laurel, altup_projections
from tightfit.model.blocks.attention import Attention, QKNorm, Rope
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.blocks.per_layer_input import PerLayerInput, per_layer_tables
from tightfit.model.config import Config
from tightfit.model.families import decoder, text_spec
from tightfit.model.families.gemma4 import unused_keys
from tightfit.model.families.nested import nested
from tightfit.model.spec import Layer, ModelSpec, NormStyle
from tightfit.model.towers.gemma3n import gemma3n_towers

ARCHITECTURES = ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration")

_DEFAULTS = {
    "vocab_size": 262_400,
    "hidden_size": 2048,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 512,
}
"""Of `Gemma3nTextConfig`, which is that of E4B."""


def spec(config: Config) -> ModelSpec:
    """A decoder, or one with encoders."""
    if config.strings("architectures")[0] == "Gemma3nForCausalLM":
        return _text(config)
    text = text_spec(config, "Gemma3nForCausalLM")
    towers = gemma3n_towers(config, text.hidden_size)
    return nested(text, "model.language_model", "lm_head", towers)


def _text(config: Config) -> ModelSpec:
    """The last `num_kv_shared_layers` read the cache of an earlier layer of their kind."""
    config = config.with_defaults(_DEFAULTS)
    count, hidden = decoder.num_layers(config), config.integer("hidden_size")
    sliding = [kind == "sliding_attention" for kind in decoder.layer_types(config)]
    sliding = sliding or [bool((i + 1) % 5) for i in range(count)]
    shared = decoder.num_kv_shared_layers(config, default=15)
    widths = _widths(config, count)
    size = config.integer("hidden_size_per_layer_input", default=256)
    inputs = config.integer("altup_num_inputs", default=4, maximum=64)
    mlp = DenseMLP(intermediate_size=widths[0], activation=config.text("hidden_activation"))
    extras = (
        AltUp(inputs=inputs),
        Laurel(rank=config.integer("laurel_rank", default=64)),
        PerLayerInput(size=size),
    )
    full = _attention(config, sliding=False)
    local = _attention(config, sliding=True)
    alike = {
        (is_local, reads, width): Layer(
            mixers=(replace(local if is_local else full, shares_cache=reads),),
            mlp=replace(mlp, intermediate_size=width),
            extras=extras,
        )
        for is_local in (True, False)
        for reads in (True, False)
        for width in set(widths)
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
        tuple(alike[sliding[i], i >= count - shared, widths[i]] for i in range(count)),
        default_tied=True,
        norm_style=NormStyle.SANDWICH,
        has_lm_head_module=False,
        embedding_scale=math.sqrt(hidden),
        logits_softcap=config.positive("final_logit_softcapping", default=30.0),
        extras=(*tables, *altup_projections("model", inputs, hidden)),
        ignored_sources=unused_keys(count - shared, count),
        verified_for_sharding=False,
    )


def _widths(config: Config, count: int) -> tuple[int, ...]:
    """`intermediate_size` of every layer; one number serves all."""
    if not isinstance(config.raw("intermediate_size"), list):
        return (config.integer("intermediate_size", default=16_384),) * count
    widths = config.integers("intermediate_size")
    if len(widths) != count or min(widths) < 1:
        raise ConfigError(
            f"{config.name} has {len(widths)} values of intermediate_size for {count} layers",
            hint="correct the config.json",
        )
    return widths


def _attention(config: Config, *, sliding: bool) -> Attention:
    """Sliding layers rotate with their own base."""
    bias, head_dim = config.boolean("attention_bias"), config.integer("head_dim")
    parameters = config.section("rope_parameters")
    kind = "sliding_attention" if sliding else "full_attention"
    if sliding and (parameters is None or parameters.section(kind) is None):
        rope = Rope(
            theta=config.positive("rope_local_base_freq", default=10_000.0),
            rotary_dim=head_dim,
            max_position_embeddings=config.integer("max_position_embeddings"),
        )
    else:
        rope = decoder.rope(config, head_dim, default_theta=1_000_000.0, kind=kind)
    return decoder.attention(
        config,
        scale=1.0,
        rope=rope,
        window=config.integer("sliding_window") if sliding else None,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=QKNorm.HEAD,
    )
