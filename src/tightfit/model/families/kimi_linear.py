"""Kimi Linear and the decoder of Kimi-K3: delta attention, latent attention, and experts."""

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.kimi_delta import KimiDeltaAttention
from tightfit.model.blocks.kimi_extras import AttentionResiduals, OutputGate
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.latent_projections import LatentProjections
from tightfit.model.blocks.mlp import DenseMLP, ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.layout import Stage, Weight
from tightfit.model.spec import Layer, ModelSpec

ARCHITECTURES = ("KimiLinearForCausalLM",)

_MOE = "block_sparse_moe"


def spec(config: Config) -> ModelSpec:
    """`linear_attn_config` lists the layers of both kinds, counted from 1.

    vLLM demands `mla_use_nope`: neither kind of layer has rotary embeddings.
    """
    if not config.boolean("mla_use_nope"):
        raise UnsupportedModelError("KimiLinearForCausalLM with rotary embeddings is not modelled")
    count = decoder.num_layers(config)
    linear = config.section("linear_attn_config")
    if linear is None:
        raise ConfigError(
            f"{config.name} lacks 'linear_attn_config'",
            hint="is this the config.json of a complete Hugging Face checkpoint?",
        )
    residuals = (AttentionResiduals(),) if config.has("attn_res_block_size") else ()
    delta, (latent, gate) = _delta(linear), _latent(config)
    first = config.integer("first_k_dense_replace", default=0, minimum=0)
    step = config.integer("moe_layer_freq", default=1)
    dense, (experts, around) = _dense(config), _experts(config)
    layers: list[Layer] = []
    alike: dict[tuple[bool, bool], Layer] = {}
    for i, is_delta in enumerate(_is_delta(linear, count)):
        sparse = experts is not None and i >= first and i % step == 0
        layer = Layer(
            mixers=(delta,) if is_delta else (latent,),
            mlp=experts if sparse else dense,
            extras=(*(() if is_delta else gate), *(around if sparse else ()), *residuals),
        )
        layers.append(alike.setdefault((is_delta, sparse), layer))
    return decoder.model(
        config,
        tuple(layers),
        max_position_embeddings=config.integer(
            "model_max_length", "max_position_embeddings", default=4096
        ),
        extras=_outside(config) if residuals else (),
        ignored_sources=decoder.layers_after(config, "num_nextn_predict_layers"),
        verified_for_sharding=False,
    )


def _is_delta(linear: Config, count: int) -> list[bool]:
    delta, full = (set(linear.integers(key)) for key in ("kda_layers", "full_attn_layers"))
    if delta & full or delta | full != set(range(1, count + 1)):
        raise ConfigError(
            f"{linear.name} has kda_layers and full_attn_layers that are not each of {count} "
            "layers once",
            hint="correct the config.json",
        )
    return [i in delta for i in range(1, count + 1)]


def _delta(linear: Config) -> KimiDeltaAttention:
    return KimiDeltaAttention(
        num_heads=linear.integer("num_heads"),
        head_dim=linear.integer("head_dim"),
        conv_kernel=linear.integer("short_conv_kernel_size"),
        full_rank_gate=linear.boolean("use_full_rank_gate"),
    )


def _latent(config: Config) -> tuple[LatentAttention, tuple[Block, ...]]:
    """Latent attention, and its gate if it has one."""
    heads, nope, rope = (
        config.integer(key)
        for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    attention = LatentAttention(
        num_heads=heads,
        q_lora_rank=config.integer("q_lora_rank") if config.has("q_lora_rank") else None,
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=config.integer("v_head_dim"),
        rope=None,
        scale=(nope + rope) ** -0.5,
    )
    if not config.boolean("mla_use_output_gate"):
        return attention, ()
    return attention, (OutputGate(num_heads=heads, head_dim=attention.v_head_dim),)


def _dense(config: Config) -> DenseMLP:
    return decoder.dense_mlp(config, activation=config.text("hidden_act", default="silu"))


def _experts(config: Config) -> tuple[MoE | None, tuple[Block, ...]]:
    """The experts, and what brings tokens to the width at which they work."""
    if not config.has("num_experts") and not config.has("num_local_experts"):
        return None, ()
    width = config.integer("moe_intermediate_size")
    activation = config.text("hidden_act", default="silu")
    copies = config.integer("num_shared_experts", "n_shared_experts", default=0, minimum=0)
    shared = DenseMLP(
        intermediate_size=width * copies, activation=activation, module="shared_experts"
    )
    key = "routed_expert_hidden_size"
    latent = config.integer(key) if config.has(key) else None
    experts = MoE(
        num_experts=config.integer(
            "num_experts", "num_local_experts", maximum=decoder.MOST_EXPERTS
        ),
        top_k=config.integer("num_experts_per_token", "num_experts_per_tok"),
        intermediate_size=width,
        activation=activation,
        renormalize=config.boolean("moe_renormalize", "norm_topk_prob", default=True),
        module=_MOE,
        names=ExpertNames(
            gate="experts.{expert}.w1.weight",
            up="experts.{expert}.w3.weight",
            down="experts.{expert}.w2.weight",
        ),
        correction_bias="gate.e_score_correction_bias",
        shared=shared if copies else None,
        latent_size=latent,
        smallest_share=config.integer("min_moe_intermediate_per_partition", default=256),
    )
    if latent is None:
        return experts, ()
    projections = LatentProjections(
        size=latent,
        module=_MOE,
        down="routed_expert_down_proj",
        up="routed_expert_up_proj",
        norm="routed_expert_norm" if config.boolean("latent_moe_use_norm") else None,
        quantizable=False,
    )
    return experts, (projections,)


def _outside(config: Config) -> tuple[Weight, ...]:
    """The last choice among residual streams."""
    place = Place(prefix="model", where=Stage.LAST, hidden_size=config.integer("hidden_size"))
    return tuple(AttentionResiduals(names=("output_attn_res",)).weights(place))
