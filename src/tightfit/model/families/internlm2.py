"""InternLM2: a Llama whose checkpoint fuses queries, keys and values, group by group."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Projections
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("InternLM2ForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """Only names differ; the order of heads inside `wqkv` changes no size."""
    if config.boolean("bias"):
        raise UnsupportedModelError("bias in InternLM2ForCausalLM is not modelled by vLLM")
    attention = decoder.attention(
        config, module="attention", names=Projections(fused="wqkv", output="wo")
    )
    mlp = decoder.dense_mlp(config, module="feed_forward", gate="w1", up="w3", down="w2")
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        names=Names(
            embedding="model.tok_embeddings",
            head="output",
            layer_norms=("attention_norm", "ffn_norm"),
        ),
        every_stage_has_ends=True,
        verified_for_sharding=False,
    )
