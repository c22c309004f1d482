"""TeleChat2: a Llama under other names, whose checkpoint fuses keys and values, head by head.

Source: vLLM's `models/telechat2.py`. Its config class is code beside the checkpoints, so sizes must
be in the config.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tightfit.model.blocks.attention import Attention, Projections
from tightfit.model.blocks.base import Place
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.layout import Part, Weight
from tightfit.model.spec import ModelSpec, Names

ARCHITECTURES = ("TeleChat2ForCausalLM",)

_KEYS = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "seq_length",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention(Attention):
    """Of the rows of `key_value`, a head's keys come before its values."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """Those of attention, with keys and values from one tensor."""
        for weight in Attention.weights(self, place):
            if weight.name.endswith(".qkv_proj.weight"):
                queries, keys, values = weight.parts
                weight = replace(weight, parts=(queries, *self._fused(keys, values)))
            yield weight

    def _fused(self, *parts: Part) -> Iterator[Part]:
        for number, part in enumerate(parts):
            yield replace(
                part,
                source=part.source.replace(".key.", ".key_value."),
                first_row=number * self.head_dim,
                source_rows=2 * part.rows,
                run_rows=self.head_dim,
                run_stride=2 * self.head_dim,
                repeats=False,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _MLP(DenseMLP):
    """Only `down_proj` has a bias."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """Those of a gated MLP with biases, but for that of gate and up."""
        found = DenseMLP.weights(self, place)
        return (weight for weight in found if not weight.name.endswith(".gate_up_proj.bias"))


def spec(config: Config) -> ModelSpec:
    """The output projections of attention and MLP have biases, and nothing else."""
    config = config.renamed(_KEYS)
    plain = decoder.attention(
        config,
        output_bias=True,
        module="self_attention",
        names=Projections(query="query", key="key", value="key", output="dense"),
    )
    attention = _Attention(**{name: getattr(plain, name) for name in Attention.__slots__})
    mlp = _MLP(intermediate_size=config.integer("intermediate_size"), activation="silu", bias=True)
    return decoder.model(
        config,
        decoder.uniform(config, attention, mlp),
        norm_eps=config.number("rms_norm_eps", default=1e-5),
        names=Names(
            embedding="transformer.word_embeddings", layers="transformer.h", norm="transformer.ln_f"
        ),
        ignored_sources=(r"\.rotary_emb(edding)?\.inv_freq$",),
        unmodelled="a bias of down_proj alone",
        verified_for_sharding=False,
    )
