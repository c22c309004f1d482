"""The way into and out of the width at which routed experts work, where it is a smaller one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.linear import replicated, vector
from tightfit.model.layout import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentProjections(Block):
    """Two linear layers around the routed experts of an MoE, whole on every rank.

    vLLM: `nemotron_h.py` (`NemotronHMoE`), `models/kimi_k3` (`KimiMoE`).
    """

    size: int
    """The width of the experts' inputs and outputs: `MoE.latent_size`."""
    module: str
    """The MoE's own."""
    down: str
    up: str
    norm: str | None = None
    """A norm before `up`."""
    bias: bool = False
    quantizable: bool = True
    """vLLM applies Kimi-K3's MXFP4 to the experts alone, whatever its `ignore` list leaves out."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """`down` and `up`."""
        for weight in self._weights(place):
            yield weight if self.quantizable else replace(weight, linear=False)

    def _weights(self, place: Place) -> Iterator[Weight]:
        at = place.inside(self.module)
        hidden, where = place.hidden_size, place.where
        yield from replicated(
            f"{at.prefix}.{self.down}", rows=self.size, columns=hidden, where=where, bias=self.bias
        )
        if self.norm is not None:
            yield vector(f"{at.prefix}.{self.norm}.weight", self.size, where)
        yield from replicated(
            f"{at.prefix}.{self.up}", rows=hidden, columns=self.size, where=where, bias=self.bias
        )
