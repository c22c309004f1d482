"""MiniCPM3: latent attention without its small cache, in a dense decoder with MiniCPM's scales.

vLLM (`models/minicpm3.py`) does not absorb the projection: it caches whole heads, values padded to
the size of keys. The defaults are those of transformers' config class.
"""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("MiniCPM3ForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """`scale_depth` divides by the square root of the depth, `dim_model_base` scales logits."""
    for key in ("attention_bias", "mlp_bias"):
        if config.boolean(key):
            raise UnsupportedModelError(f"{key} in MiniCPM3ForCausalLM is not modelled")
    hidden_size = config.integer("hidden_size", default=2560)
    heads = config.integer("num_attention_heads", default=40)
    nope = config.integer("qk_nope_head_dim", default=64)
    rope_dim = config.integer("qk_rope_head_dim", default=32)
    attention = LatentAttention(
        num_heads=heads,
        q_lora_rank=config.integer("q_lora_rank", default=768),
        kv_lora_rank=config.integer("kv_lora_rank", default=256),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope_dim,
        v_head_dim=config.integer("v_head_dim", default=hidden_size // heads or 1),
        rope=decoder.rope(config, rope_dim),
        scale=(nope + rope_dim) ** -0.5,
        absorbed=False,
    )
    layers = decoder.uniform(config, attention, decoder.dense_mlp(config))
    base = config.positive("dim_model_base", default=256)
    return decoder.model(
        config,
        layers,
        default_tied=True,
        every_stage_has_ends=True,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
        embedding_scale=config.number("scale_emb", default=12.0),
        residual_scale=config.number("scale_depth", default=1.4) / len(layers) ** 0.5,
        logits_scale=base / hidden_size,
    )
