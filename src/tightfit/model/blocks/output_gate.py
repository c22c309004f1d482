"""A gate of attention's output, with a matrix of its own: Muse Glimmer, Trinity, Step 3.5."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tightfit.model.blocks.attention import Attention, head_axes
from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.linear import column_parallel
from tightfit.model.layout import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputGate(Block):
    """One gate per feature of the attention's output, or per head, dealt like its heads."""

    attention: Attention
    name: str = "gate_proj"
    by_head: bool = False

    def weights(self, place: Place) -> Iterator[Weight]:
        """`gate_proj`, which vLLM calls `output_gate_proj` in Muse Glimmer."""
        at = place.inside(self.attention.module).prefix
        queries, _ = head_axes(self.attention)
        gates = replace(queries, unit_rows=1) if self.by_head else queries
        yield from column_parallel(
            f"{at}.{self.name}", gates, columns=place.hidden_size, where=place.where
        )
