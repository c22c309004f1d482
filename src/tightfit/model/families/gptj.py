"""GPT-J: MLP beside attention, one LayerNorm, neighbouring features rotated, a bias on the head."""

from tightfit.model.blocks.attention import Projections, Rope
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("GPTJForCausalLM",)

_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
_DEFAULTS = {
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "n_positions": 2048,
    "vocab_size": 50400,
    "rotary_dim": 64,
}


def spec(config: Config) -> ModelSpec:
    """Only the MLP and the head have biases."""
    config = config.with_defaults(_DEFAULTS).renamed(_KEYS)
    hidden_size = config.integer("hidden_size")
    attention = decoder.plain_attention(
        config,
        rope=Rope(
            theta=10_000.0,
            rotary_dim=config.integer("rotary_dim"),
            max_position_embeddings=config.integer("max_position_embeddings"),
            interleaved=True,
        ),
        module="attn",
        names=Projections(output="out_proj"),
    )
    mlp = DenseMLP(
        intermediate_size=config.integer("intermediate_size", default=4 * hidden_size),
        activation=config.text("activation_function", default="gelu_new"),
        bias=True,
        gated=False,
        up="fc_in",
        down="fc_out",
    )
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        norm_eps=config.number("layer_norm_epsilon", default=1e-5),
        norm_bias=True,
        parallel_residual=True,
        head_bias=True,
        names=Names(
            embedding="transformer.wte",
            layers="transformer.h",
            norm="transformer.ln_f",
            layer_norms=("ln_1",),
        ),
        ignored_sources=(r"\.attn\.(bias|masked_bias|embed_positions)$",),
        every_stage_has_ends=True,
    )
