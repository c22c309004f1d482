"""What Kimi-K3 has beside Kimi Linear: a gate behind latent attention, and attention residuals.

vLLM's `models/kimi_k3/nvidia/mla.py` and `model.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.linear import column_parallel, vector
from tightfit.model.layout import Axis, Part, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputGate(Block):
    """A projection whose sigmoid multiplies the output of each head, dealt like the heads."""

    num_heads: int
    head_dim: int
    module: str = "self_attn"

    def weights(self, place: Place) -> Iterator[Weight]:
        """`g_proj`, which vLLM fuses with the projections to the latents."""
        axis = Axis(label="num_attention_heads", units=self.num_heads, unit_rows=self.head_dim)
        yield from column_parallel(
            f"{place.prefix}.{self.module}.g_proj",
            axis,
            columns=place.hidden_size,
            where=place.where,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionResiduals(Block):
    """Scores by which a sublayer chooses among the residual streams of earlier blocks."""

    names: tuple[str, ...] = ("self_attention_res", "mlp_res")

    def weights(self, place: Place) -> Iterator[Weight]:
        """A norm and one row for each."""
        for name in self.names:
            prefix = f"{place.prefix}.{name}"
            yield vector(f"{prefix}_norm.weight", place.hidden_size, place.where)
            yield Weight(
                name=f"{prefix}_proj.weight",
                parts=(Part(source=f"{prefix}_proj.weight", rows=1),),
                columns=place.hidden_size,
                where=place.where,
            )
