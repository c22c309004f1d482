"""A gate of attention's output, with a matrix of its own: Muse Glimmer."""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.attention import Attention, head_axes
from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.linear import column_parallel
from tightfit.model.layout import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputGate(Block):
    """One gate per feature of the attention's output, dealt like its heads."""

    attention: Attention

    def weights(self, place: Place) -> Iterator[Weight]:
        """`gate_proj`, which vLLM calls `output_gate_proj`."""
        at = place.inside(self.attention.module).prefix
        queries, _ = head_axes(self.attention)
        yield from column_parallel(
            f"{at}.gate_proj", queries, columns=place.hidden_size, where=place.where
        )
