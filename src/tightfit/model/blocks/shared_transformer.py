"""Attention and an MLP that several layers share, with adapters of each layer's own: Zamba 2.

The attention reads the hidden state beside the first layer's input, twice the hidden size. Every
layer that uses a shared transformer keeps keys and values of its own; the checkpoint has the
parameters, and all adapters, in the first of them. Source: vLLM's `models/zamba2.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tightfit.model.blocks.attention import Attention, head_axes
from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.linear import column_parallel, linear, replicated, stack, vector
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.layout import Axis, Cut, Weight

_MODULE = "shared_transformer"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedAttention(Attention):
    """`owned` in the layer that has the parameters, with the `adapters` of which numbers."""

    owned: bool
    adapters: tuple[int, ...] = ()
    adapter_rank: int = 0

    def weights(self, place: Place) -> Iterator[Weight]:
        """Those of attention with wide inputs, the adapters of each projection, and the norm."""
        if not self.owned:
            return
        width = 2 * place.hidden_size
        wide = Place(prefix=place.prefix, where=place.where, hidden_size=width)
        for weight in Attention.weights(self, wide):
            if weight.cut is Cut.INPUT:
                (part,) = weight.parts
                weight = replace(weight, parts=(replace(part, rows=place.hidden_size),))
            yield weight
        at, where = place.inside(self.module).prefix, place.where
        inner = Axis(label="adapter_rank", units=self.adapter_rank)
        for number in self.adapters:
            for name in ("q", "k", "v"):
                adapter = f"{at}.linear_{name}_adapter_list.{number}"
                yield from column_parallel(f"{adapter}.0", inner, columns=width, where=where)
                yield from column_parallel(
                    f"{adapter}.1", head_axes(self)[0], columns=self.adapter_rank, where=where
                )
        yield vector(f"{place.prefix}.{_MODULE}.input_layernorm.weight", width, where)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMLP(DenseMLP):
    """As for the attention; adapters are of gate and up."""

    owned: bool
    adapters: tuple[int, ...] = ()
    adapter_rank: int = 0

    def weights(self, place: Place) -> Iterator[Weight]:
        """Those of a gated MLP, the adapters, and the norm before it."""
        if not self.owned:
            return
        yield from DenseMLP.weights(self, place)
        at, where = place.inside(self.module).prefix, place.where
        inner = Axis(label="adapter_rank", units=self.adapter_rank)
        half = Axis(label="intermediate_size", units=self.intermediate_size)
        for number in self.adapters:
            adapter = f"{at}.gate_up_proj_adapter_list.{number}"
            yield from column_parallel(
                f"{adapter}.0", inner, columns=place.hidden_size, where=where
            )
            yield from linear(
                f"{adapter}.1",
                stack(adapter, "1", (("gate", half), ("up", half))),
                columns=self.adapter_rank,
                cut=Cut.OUTPUT,
                where=where,
                bias=False,
            )
        norm = f"{place.prefix}.{_MODULE}.pre_ff_layernorm.weight"
        yield vector(norm, place.hidden_size, where)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedOutput(Block):
    """The layer's own matrix behind the shared transformer, whole on every rank."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """`linear`."""
        size = place.hidden_size
        yield from replicated(f"{place.prefix}.linear", rows=size, columns=size, where=place.where)
