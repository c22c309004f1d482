"""LFM2, dense and mixture of experts: short convolutions, and attention in some layers."""

from tightfit.model.blocks.attention import Projections, QKNorm
from tightfit.model.blocks.mlp import DenseMLP, ExpertNames, MoE
from tightfit.model.blocks.short_conv import ShortConv
from tightfit.model.config import Config
from tightfit.model.families import decoder, hybrid
from tightfit.model.spec import Layer, ModelSpec, Names
from tightfit.units import round_up

ARCHITECTURES = ("Lfm2ForCausalLM", "Lfm2MoeForCausalLM")

_SHARED = {
    "vocab_size": 65536,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "conv_L_cache": 3,
}
_DENSE = {**_SHARED, "hidden_size": 2560}
_SPARSE = {
    **_SHARED,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1792,
}
_KINDS = {"conv": "conv", "full_attention": "full_attention"}
_MODULE = "feed_forward"


def spec(config: Config) -> ModelSpec:
    """Layers by `layer_types`, else by `full_attn_idxs`, else all of them attention."""
    sparse = config.strings("architectures")[0] == "Lfm2MoeForCausalLM"
    config = config.with_defaults(_SPARSE if sparse else _DENSE)
    count = decoder.num_layers(config)
    attention = decoder.attention(
        config,
        default_theta=1_000_000.0,
        qk_norm=QKNorm.HEAD,
        names=Projections(output="out_proj", query_norm="q_layernorm", key_norm="k_layernorm"),
    )
    convolution = ShortConv(
        channels=config.integer("hidden_size"),
        conv_kernel=config.integer("conv_L_cache"),
        bias=config.boolean("conv_bias"),
    )
    mixers = {"conv": convolution, "full_attention": attention}
    kinds = hybrid.layer_kinds(config, _words(config, count), _KINDS, count=count)
    mlps = _mixed(config, count) if sparse else [_dense(config, _adjusted(config))] * count
    alike = {(kind, mlp): Layer(mixers=(mixers[kind],), mlp=mlp) for kind in mixers for mlp in mlps}
    return decoder.model(
        config,
        tuple(alike[pair] for pair in zip(kinds, mlps, strict=True)),
        names=Names(norm="model.embedding_norm", layer_norms=("operator_norm", "ffn_norm")),
        norm_eps=config.positive("norm_eps", default=1e-5),
        tie_word_embeddings=config.boolean("tie_embedding", "tie_word_embeddings", default=True),
        verified_for_sharding=False,
    )


def _words(config: Config, count: int) -> tuple[str, ...]:
    words = config.strings("layer_types")
    if words or not config.has("full_attn_idxs"):
        return words or ("full_attention",) * count
    chosen = set(config.integers("full_attn_idxs"))
    return tuple("full_attention" if i in chosen else "conv" for i in range(count))


def _dense(config: Config, width: int) -> DenseMLP:
    return DenseMLP(
        intermediate_size=width, activation="silu", module=_MODULE, gate="w1", up="w3", down="w2"
    )


def _adjusted(config: Config) -> int:
    """Two thirds of the config's width, times a factor, rounded up (`Lfm2MLP`)."""
    width = config.integer("block_ff_dim", "intermediate_size", default=12288)
    if config.boolean("block_auto_adjust_ff_dim", default=True):
        width = int(config.positive("block_ffn_dim_multiplier", default=1.0) * int(2 * width / 3))
        width = round_up(width, config.integer("block_multiple_of", default=256))
    return width


def _mixed(config: Config, count: int) -> list[DenseMLP | MoE]:
    dense = _dense(config, config.integer("intermediate_size"))
    experts = MoE(
        num_experts=config.integer("num_experts", maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("moe_intermediate_size"),
        activation="silu",
        renormalize=config.boolean("norm_topk_prob", default=True),
        module=_MODULE,
        names=ExpertNames(
            gate="experts.{expert}.w1.weight",
            up="experts.{expert}.w3.weight",
            down="experts.{expert}.w2.weight",
        ),
        correction_bias="expert_bias" if config.boolean("use_expert_bias", default=True) else None,
    )
    first = config.integer("num_dense_layers", default=2, minimum=0)
    return [dense if i < first else experts for i in range(count)]
