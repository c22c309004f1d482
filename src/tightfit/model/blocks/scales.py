"""Scales of a layer and around its router: Gemma 4."""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.linear import vector
from tightfit.model.layout import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterScales(Block):
    """A scale of each input of the router, and one of each expert's output."""

    num_experts: int

    def weights(self, place: Place) -> Iterator[Weight]:
        """`router.scale` and `router.per_expert_scale`, whole on every rank."""
        at = place.inside("router").prefix
        yield vector(f"{at}.scale", place.hidden_size, place.where)
        yield vector(f"{at}.per_expert_scale", self.num_experts, place.where)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScalar(Block):
    """What the output of a layer is multiplied by; checkpoints hold it as a buffer."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """`layer_scalar`, one element."""
        yield vector(f"{place.prefix}.layer_scalar", 1, place.where)
