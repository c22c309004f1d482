"""Qwen 1: GPT-2's names around a Llama; its MLP is half as wide as `intermediate_size` says.

vLLM had it until 0.23.
"""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Projections
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("QWenLMHeadModel",)


def spec(config: Config) -> ModelSpec:
    """Only the fused projection has a bias. Its vision model has the same class name."""
    if config.has("visual"):
        raise UnsupportedModelError("QWenLMHeadModel with images (Qwen-VL) is not modelled")
    longest = min(
        config.integer(key, default=8192) for key in ("max_position_embeddings", "seq_length")
    )
    config = config.renamed({"rope_theta": "rotary_emb_base", "head_dim": "kv_channels"})
    attention = decoder.attention(
        config,
        qkv_bias=True,
        module="attn",
        names=Projections(fused="c_attn", output="c_proj"),
    )
    mlp = decoder.dense_mlp(
        config,
        intermediate_size=config.integer("intermediate_size", minimum=2) // 2,
        gate="w2",
        up="w1",
        down="c_proj",
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        norm_eps=config.number("layer_norm_epsilon", default=1e-6),
        max_position_embeddings=longest,
        names=Names(
            embedding="transformer.wte",
            layers="transformer.h",
            norm="transformer.ln_f",
            layer_norms=("ln_1", "ln_2"),
        ),
        ignored_sources=(r"\.rotary_emb\.inv_freq$",),
        every_stage_has_ends=True,
        verified_for_sharding=False,
    )
