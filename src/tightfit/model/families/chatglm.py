"""ChatGLM 2 and 3 and GLM-4-9B with their first config (`ChatGLMModel`, remote code).

Two KV heads, half of each head rotated, projections and MLP fused in the checkpoint. Defaults are
those of vLLM's `ChatGLMConfig`.
"""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Projections
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("ChatGLMModel",)

_KEYS = {
    "num_hidden_layers": "num_layers",
    "vocab_size": "padded_vocab_size",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "seq_length",
}
_DEFAULTS = {
    "num_hidden_layers": 28,
    "vocab_size": 65024,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def spec(config: Config) -> ModelSpec:
    """`rope_ratio` multiplies the base."""
    for key in ("rmsnorm", "post_layer_norm"):
        if not config.boolean(key, default=True):
            raise UnsupportedModelError(f"{key} = false in ChatGLM is not modelled")
    config = config.renamed(_KEYS).with_defaults(_DEFAULTS)
    config = config.with_defaults({"partial_rotary_factor": 0.5})
    heads, bias = config.integer("num_attention_heads"), config.boolean("add_bias_linear")
    grouped = config.boolean("multi_query_attention")
    attention = decoder.attention(
        config,
        default_kv_heads=config.integer("multi_query_group_num", default=1) if grouped else heads,
        default_theta=10_000.0 * config.positive("rope_ratio", default=1.0),
        qkv_bias=bias or config.boolean("add_qkv_bias"),
        output_bias=bias,
        module="self_attention",
        names=Projections(fused="query_key_value", output="dense"),
    )
    assert attention.rope is not None
    attention = replace(attention, rope=replace(attention.rope, interleaved=True))
    mlp = decoder.dense_mlp(config, bias=bias, fused="dense_h_to_4h", down="dense_4h_to_h")
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        norm_eps=config.number("layernorm_epsilon", default=1e-5),
        names=Names(
            embedding="transformer.embedding.word_embeddings",
            layers="transformer.encoder.layers",
            norm="transformer.encoder.final_layernorm",
            head="transformer.output_layer",
        ),
        ignored_sources=(r"^transformer\.rotary_pos_emb\.",),
        every_stage_has_ends=True,
        verified_for_sharding=False,
    )
