"""Baichuan 1 and 2: a Llama with one fused tensor (`W_pack`); the 13B has alibi instead of rope.

vLLM had it until 0.23.
"""

from dataclasses import replace

from tightfit.model.blocks.attention import Projections
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("BaichuanForCausalLM", "BaiChuanForCausalLM")

_ROPE_HIDDEN_SIZE = 4096


def spec(config: Config) -> ModelSpec:
    """The class written with a small c is that of the 13B and of Baichuan 2, whose 7B rotates."""
    config = config.renamed({"max_position_embeddings": "model_max_length"})
    attention = decoder.attention(config, names=Projections(fused="W_pack"))
    rotates = config.strings("architectures")[0] == "BaiChuanForCausalLM"
    if not rotates and config.integer("hidden_size") != _ROPE_HIDDEN_SIZE:
        attention = replace(attention, rope=None, alibi=True)
    return decoder.model(
        config,
        decoder.uniform(config, attention, decoder.dense_mlp(config)),
        every_stage_has_ends=True,
        verified_for_sharding=False,
    )
