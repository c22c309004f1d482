"""Whisper: an encoder of audio, and a decoder that attends to it."""

from dataclasses import replace

from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.cross_attention import CrossAttention, KeysWithoutBias
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import Layer, ModelSpec, Names
from tightfit.model.towers.vit import parameter
from tightfit.model.towers.whisper import head_dim, whisper_tower

ARCHITECTURES = ("WhisperForConditionalGeneration",)

_DEFAULTS = {
    "vocab_size": 51_865,
    "num_mel_bins": 80,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "d_model": 384,
    "activation_function": "gelu",
    "max_source_positions": 1500,
    "max_target_positions": 448,
}


def spec(config: Config) -> ModelSpec:
    """The decoder's table is whole and without padding on every rank, and serves as its head."""
    config = config.with_defaults(_DEFAULTS)
    hidden, heads = config.integer("d_model"), config.integer("decoder_attention_heads")
    size, positions = head_dim(config, heads), config.integer("max_target_positions")
    attention = KeysWithoutBias(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=size,
        rope=None,
        scale=size**-0.5,
        qkv_bias=True,
        output_bias=True,
        names=Projections(output="out_proj"),
    )
    layer = Layer(
        mixers=(attention, CrossAttention(num_heads=heads, head_dim=size)),
        mlp=DenseMLP(
            intermediate_size=config.integer("decoder_ffn_dim"),
            activation=config.text("activation_function"),
            bias=True,
            gated=False,
            module="",
            up="fc1",
            down="fc2",
        ),
    )
    tower = whisper_tower(config)
    count = config.integer("decoder_layers", maximum=1000)
    model = decoder.model(
        config.with_defaults({"hidden_size": hidden}),
        (layer,) * count,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        norm_eps=1e-5,
        norm_bias=True,
        encoder_tokens=config.integer("max_source_positions"),
        towers=(tower,),
        whole_embedding=True,
        names=Names(
            embedding="model.decoder.embed_tokens",
            layers="model.decoder.layers",
            norm="model.decoder.layer_norm",
            head="proj_out",
            layer_norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        ),
    )
    return replace(
        model, extras=(parameter("model.decoder.embed_positions.weight", positions, hidden),)
    )
