"""Qwen3-Next and Qwen3.5: gated delta nets, and gated attention in every fourth layer.

Qwen3.5's towers are another family's matter, which takes its decoder from here.
"""

from dataclasses import replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Attention, QKNorm
from tightfit.model.blocks.gated_delta_net import GatedDeltaNet
from tightfit.model.blocks.mlp import DenseMLP, ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder, hybrid
from tightfit.model.spec import Layer, ModelSpec

ARCHITECTURES = ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")

_SHARED = {"head_dim": 256, "partial_rotary_factor": 0.25, "max_position_embeddings": 32768}
_DEFAULTS = {
    "Qwen3NextForCausalLM": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "decoder_sparse_step": 1,
        **_SHARED,
    },
    "Qwen3_5ForCausalLM": {
        "vocab_size": 248_320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        **_SHARED,
    },
    "Qwen3_5MoeForCausalLM": {
        "vocab_size": 248_320,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        **_SHARED,
    },
}
"""Of transformers' config classes."""
_KINDS = {"linear_attention": "linear_attention", "full_attention": "full_attention"}


def spec(config: Config) -> ModelSpec:
    """Layers by `layer_types`, else by `full_attention_interval`."""
    architecture = config.strings("architectures")[0]
    config = config.with_defaults(_DEFAULTS[architecture])
    if config.boolean("attention_bias") or config.boolean("qkv_bias"):
        raise UnsupportedModelError(f"attention_bias in {architecture} is not modelled")
    if config.boolean("layer_scale"):
        raise UnsupportedModelError(f"layer_scale in {architecture} is not modelled")
    mixers = {
        "linear_attention": _delta_net(config, interleaved=architecture.startswith("Qwen3Next")),
        "full_attention": _attention(config),
    }
    words = config.strings("layer_types") or hybrid.every(config, default=4)
    count = decoder.num_layers(config)
    kinds = hybrid.layer_kinds(config, words, _KINDS, count=count)
    mlps = _mlps(config, architecture, count)
    alike = {(kind, mlp): Layer(mixers=(mixers[kind],), mlp=mlp) for kind in mixers for mlp in mlps}
    return decoder.model(
        config,
        tuple(alike[pair] for pair in zip(kinds, mlps, strict=True)),
        norm_unit_offset=True,
        every_stage_has_ends=True,
        every_stage_has_head=None if architecture.startswith("Qwen3Next") else False,
        every_stage_has_norm=False,
        verified_for_sharding=architecture == "Qwen3NextForCausalLM",
        ignored_sources=(r"(^|\.)mtp\.",),
    )


def _attention(config: Config) -> Attention:
    attention = decoder.attention(config, qk_norm=QKNorm.HEAD)
    return replace(attention, output_gate=config.boolean("attn_output_gate", default=True))


def _delta_net(config: Config, *, interleaved: bool) -> GatedDeltaNet:
    keys = config.integer("linear_num_key_heads", default=16)
    values = config.integer("linear_num_value_heads", default=32)
    if values % keys:
        raise ConfigError(
            f"{config.name} has linear_num_value_heads = {values}, which is not a multiple of "
            f"linear_num_key_heads = {keys}",
            hint="correct the config.json",
        )
    # vLLM takes the state's dtype from the configs of Qwen3.5 only.
    given = config.raw("mamba_ssm_dtype") is not None and not interleaved
    return GatedDeltaNet(
        num_k_heads=keys,
        num_v_heads=values,
        head_k_dim=config.integer("linear_key_head_dim", default=128),
        head_v_dim=config.integer("linear_value_head_dim", default=128),
        conv_kernel=config.integer("linear_conv_kernel_dim", default=4),
        interleaved=interleaved,
        ssm_dtype=hybrid.state_dtype(config, "mamba_ssm_dtype") if given else None,
    )


def _mlps(config: Config, architecture: str, count: int) -> list[DenseMLP | MoE]:
    if architecture == "Qwen3_5ForCausalLM":
        return [decoder.dense_mlp(config)] * count
    stacked = architecture == "Qwen3_5MoeForCausalLM"
    experts = MoE(
        num_experts=config.integer("num_experts", maximum=decoder.MOST_EXPERTS, minimum=0) or 1,
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("moe_intermediate_size", default=512),
        activation=config.text("hidden_act", default="silu"),
        renormalize=config.boolean("norm_topk_prob", default=True),
        names=_STACKED if stacked else ExpertNames(),
        shared=DenseMLP(
            intermediate_size=config.integer("shared_expert_intermediate_size", default=512),
            activation=config.text("hidden_act", default="silu"),
            module="shared_expert",
        ),
        shared_gate="shared_expert_gate",
    )
    if stacked:
        return [experts] * count
    step = config.integer("decoder_sparse_step")
    dense_layers = set(config.integers("mlp_only_layers"))
    if not config.integer("num_experts", minimum=0):
        dense_layers = set(range(count))
    dense = decoder.dense_mlp(config)
    return [dense if i in dense_layers or (i + 1) % step else experts for i in range(count)]


_STACKED = ExpertNames(gate_up="experts.gate_up_proj", down="experts.down_proj", stacked=True)
