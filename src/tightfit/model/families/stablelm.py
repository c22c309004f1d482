"""StableLM 2 and 3B: Llama with LayerNorms, and only a part of each head rotated."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("StableLmForCausalLM",)

_KEYS = {"partial_rotary_factor": "rope_pct", "layer_norm_eps": "norm_eps"}
_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "partial_rotary_factor": 0.25,
}


def spec(config: Config) -> ModelSpec:
    """What only the 12B has, vLLM does not build."""
    for key in ("qk_layernorm", "use_parallel_residual"):
        if config.boolean(key):
            raise UnsupportedModelError(
                f"{key} in StableLM is not modelled, and vLLM ignores it",
                hint="the model would not answer sensibly",
            )
    config = config.renamed(_KEYS).with_defaults(_DEFAULTS)
    attention = decoder.attention(
        config, default_kv_heads=32, qkv_bias=config.boolean("use_qkv_bias")
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, decoder.dense_mlp(config)),
        norm_eps=config.number("layer_norm_eps", default=1e-5),
        norm_bias=True,
        every_stage_has_ends=True,
    )
