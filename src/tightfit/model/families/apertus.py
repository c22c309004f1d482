"""Apertus: an activation with two learned parameters (xIELU), no gate, norms of each head."""

from tightfit.model.blocks.attention import QKNorm
from tightfit.model.blocks.xielu import XIELU
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec, Names

ARCHITECTURES = ("ApertusForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """The buffers of the activation are saved with it, and computed anew."""
    config = config.with_defaults({"hidden_act": "xielu", "max_position_embeddings": 65536})
    bias = config.boolean("attention_bias")
    attention = decoder.attention(
        config,
        default_theta=12_000_000.0,
        qk_norm=QKNorm.HEAD,
        qkv_bias=bias,
        output_bias=bias,
    )
    mlp = decoder.dense_mlp(config, bias=config.boolean("mlp_bias"), gated=False)
    layer = Layer(mixers=(attention,), mlp=mlp, extras=(XIELU(module="mlp.act_fn"),))
    return decoder.model(
        config,
        (layer,) * decoder.num_layers(config),
        norm_eps=config.number("rms_norm_eps", default=1e-5),
        names=Names(layer_norms=("attention_layernorm", "feedforward_layernorm")),
        ignored_sources=(r"\.act_fn\.(beta|eps)$",),
        verified_for_sharding=False,
    )
