"""OPT: learned positions (two more than it can use), LayerNorms before or, in the 350M, after."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.families.positions import learned_positions
from tightfit.model.layout import Part, Stage, Weight
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("OPTForCausalLM",)

_OFFSET = 2
_DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "num_attention_heads": 12,
}
_DECODER = "model.decoder"


def spec(config: Config) -> ModelSpec:
    """The 350M has narrower embeddings, with a projection at either end."""
    config = config.with_defaults(_DEFAULTS)
    if not config.boolean("layer_norm_elementwise_affine", default=True):
        raise UnsupportedModelError("layer_norm_elementwise_affine = false in OPT is not modelled")
    hidden_size, bias = config.integer("hidden_size"), config.boolean("enable_bias", default=True)
    attention = decoder.plain_attention(
        config,
        qkv_bias=bias,
        output_bias=bias,
        names=Projections(output="out_proj"),
    )
    mlp = DenseMLP(
        intermediate_size=config.integer("ffn_dim"),
        activation=config.text("activation_function", default="relu"),
        bias=bias,
        gated=False,
        module="",
        up="fc1",
        down="fc2",
    )
    before = config.boolean("do_layer_norm_before", default=True)
    last = before and not config.boolean("_remove_final_layer_norm")
    width = config.integer("word_embed_proj_dim", default=hidden_size)
    rows = config.integer("max_position_embeddings") + _OFFSET
    ends = () if width == hidden_size else _projections(hidden_size, width)
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        default_tied=True,
        norm_eps=1e-5,
        norm_bias=True,
        embedding_size=width,
        names=Names(
            embedding=f"{_DECODER}.embed_tokens",
            layers=f"{_DECODER}.layers",
            norm=f"{_DECODER}.final_layer_norm" if last else None,
            layer_norms=("self_attn_layer_norm", "final_layer_norm"),
        ),
        extras=(
            learned_positions(f"{_DECODER}.embed_positions", rows, hidden_size, Stage.EVERY),
            *ends,
        ),
        positions=f"{_DECODER}.embed_positions.weight",
        first_position=_OFFSET,
        unmodelled=None if before else "norms of the residual stream itself",
        every_stage_has_ends=True,
    )


def _projections(hidden_size: int, width: int) -> tuple[Weight, ...]:
    def matrix(name: str, rows: int, columns: int) -> Weight:
        name = f"{_DECODER}.{name}.weight"
        part = Part(source=name, rows=rows)
        return Weight(name=name, parts=(part,), columns=columns, where=Stage.EVERY)

    return matrix("project_in", hidden_size, width), matrix("project_out", width, hidden_size)
