"""MiniMax-M3 (text): the first layers dense and full, then sparse attention and experts.

Source: vLLM's `models/minimax_m3/nvidia/model.py`, which routes in float32.
"""

from typing import Any

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import QKNorm
from tightfit.model.blocks.block_sparse_attention import BlockSparseAttention
from tightfit.model.blocks.mlp import ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec

ARCHITECTURES = ("MiniMaxM3ForCausalLM", "MiniMaxM3SparseForCausalLM")


def spec(config: Config) -> ModelSpec:
    """`sparse_attention_freq` and `moe_layer_freq` have a 1 for layers of each kind."""
    if config.boolean("attention_output_gate"):
        raise UnsupportedModelError("attention_output_gate in MiniMax-M3 is not modelled")
    count = decoder.num_layers(config)
    sparse = config.section("sparse_attention_config")
    if sparse is None:
        raise UnsupportedModelError("MiniMax-M3 without sparse_attention_config is not modelled")
    full = decoder.attention(config, default_theta=5_000_000.0, qk_norm=QKNorm.HEAD)
    if sparse.integer("sparse_num_index_heads") != full.num_kv_heads:
        raise UnsupportedModelError(
            "sparse_num_index_heads other than num_key_value_heads is not modelled",
            hint="vLLM deals the heads of the index as it deals KV heads",
        )
    disabled = _flags(sparse, "sparse_disable_index_value", count)
    chosen = _flags(sparse, "sparse_attention_freq", count)
    if any(picks and not off for picks, off in zip(chosen, disabled, strict=True)):
        raise UnsupportedModelError("values of the index in MiniMax-M3 are not modelled")
    fields: dict[str, Any] = {name: getattr(full, name) for name in full.__dataclass_fields__}
    picking = BlockSparseAttention(
        **fields,
        index_dim=sparse.integer("sparse_index_dim"),
        topk_blocks=sparse.integer("sparse_topk_blocks"),
        sparse_block_size=sparse.integer("sparse_block_size"),
    )
    activation = config.text("hidden_act", default="swigluoai")
    dense = decoder.dense_mlp(
        config, intermediate_size=config.integer("dense_intermediate_size"), activation=activation
    )
    experts = _experts(config, activation)
    routed = _flags(config, "moe_layer_freq", count)
    kinds = {
        (picks, routes): Layer(
            mixers=(picking if picks else full,), mlp=experts if routes else dense
        )
        for picks in (False, True)
        for routes in (False, True)
    }
    return decoder.model(
        config,
        tuple(kinds[kind] for kind in zip(chosen, routed, strict=True)),
        norm_unit_offset=config.boolean("use_gemma_norm", default=True),
        ignored_sources=(
            r"(^|\.)mtp\.",
            *decoder.layers_after(config, "num_mtp_modules", "num_nextn_predict_layers"),
        ),
        verified_for_sharding=False,
    )


def _experts(config: Config, activation: str) -> MoE:
    width = config.integer("intermediate_size")
    shared = config.integer("n_shared_experts", default=0, minimum=0)
    return MoE(
        num_experts=config.integer("num_local_experts", maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=width,
        activation=activation,
        renormalize=True,
        module="block_sparse_moe",
        router_dtype="F32",
        correction_bias="e_score_correction_bias" if config.boolean("use_routing_bias") else None,
        names=ExpertNames(
            gate="experts.{expert}.w1.weight",
            up="experts.{expert}.w3.weight",
            down="experts.{expert}.w2.weight",
        ),
        shared=decoder.shared_mlp(width * shared, activation),
    )


def _flags(config: Config, key: str, count: int) -> tuple[bool, ...]:
    flags = config.integers(key)
    if len(flags) != count:
        raise ConfigError(
            f"{config.name} has {len(flags)} of {key} for num_hidden_layers = {count}",
            hint="correct the config.json",
        )
    return tuple(map(bool, flags))
