"""xIELU, an activation with two learned parameters: Apertus."""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.linear import vector
from tightfit.model.layout import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class XIELU(Block):
    """How steep the activation is on either side of zero."""

    module: str

    def weights(self, place: Place) -> Iterator[Weight]:
        """`alpha_p` and `alpha_n`, one number each."""
        at = place.inside(self.module).prefix
        for name in ("alpha_p", "alpha_n"):
            yield vector(f"{at}.{name}", 1, place.where)
