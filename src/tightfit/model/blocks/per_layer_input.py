"""Embeddings of each layer's own, gated by the hidden state and added to it: Gemma 3n and 4."""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.linear import column_parallel, norm, replicated
from tightfit.model.layout import Axis, Cut, Part, Stage, Weight
from tightfit.units import round_up

_VOCAB_PADDING = 64
"""vLLM's `DEFAULT_VOCAB_PADDING_SIZE`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayerInput(Block):
    """The gate and the projection inside a layer, whole on every rank (vLLM's `gemma3n.py`)."""

    size: int
    """Features of an embedding of one layer."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """`per_layer_input_gate`, `per_layer_projection` and the norm after them."""
        hidden, at = place.hidden_size, place.prefix
        gate, projection = f"{at}.per_layer_input_gate", f"{at}.per_layer_projection"
        yield from replicated(gate, rows=self.size, columns=hidden, where=place.where)
        yield from replicated(projection, rows=hidden, columns=self.size, where=place.where)
        yield from norm(f"{at}.post_per_layer_input_norm", hidden, place.where)


def per_layer_tables(
    prefix: str, *, vocab_size: int, num_layers: int, size: int, hidden_size: int
) -> Iterator[Weight]:
    """The table that holds the embeddings of all layers, and the projection of the hidden state.

    The table has `[vocab_size, num_layers * size]` elements: nearly a third of Gemma 3n E4B. vLLM
    builds them on every pipeline stage.
    """
    width = num_layers * size
    name = f"{prefix}.embed_tokens_per_layer.weight"
    vocab = Axis(label="vocab_size_per_layer_input", units=round_up(vocab_size, _VOCAB_PADDING))
    yield Weight(
        name=name,
        parts=(Part(source=name, rows=vocab_size, axis=vocab),),
        columns=width,
        cut=Cut.OUTPUT,
        where=Stage.EVERY,
    )
    yield from column_parallel(
        f"{prefix}.per_layer_model_projection",
        Axis(label="the width of all per-layer inputs", units=width),
        columns=hidden_size,
        where=Stage.EVERY,
    )
    yield from norm(f"{prefix}.per_layer_projection_norm", size, Stage.EVERY)
