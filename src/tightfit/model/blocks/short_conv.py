"""A short gated convolution in place of attention: LFM2.

Cuts are those of vLLM's `model_executor/layers/mamba/short_conv.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.base import Mixer, Place
from tightfit.model.blocks.linear import row_parallel
from tightfit.model.blocks.mamba import convolution, projection
from tightfit.model.cache import Cache, State, StateCache
from tightfit.model.layout import Axis, Rank, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConv(Mixer):
    """`in_proj` gives two gates and the inputs of a depthwise convolution."""

    channels: int
    conv_kernel: int
    bias: bool = False
    module: str = "conv"

    def weights(self, place: Place) -> Iterator[Weight]:
        """Everything is dealt by channel."""
        at, inner = place.inside(self.module), self._channels()
        yield from projection(
            f"{at.prefix}.in_proj",
            (inner, inner, inner),
            columns=place.hidden_size,
            where=place.where,
            bias=self.bias,
        )
        yield from convolution(
            f"{at.prefix}.conv", (inner,), self.conv_kernel, where=place.where, bias=self.bias
        )
        yield from row_parallel(
            f"{at.prefix}.out_proj", inner, rows=place.hidden_size, where=at.where, bias=self.bias
        )

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """The last inputs of the convolution."""
        shape = (self.conv_kernel - 1, self._channels().span(rank)[1])
        return (StateCache(kind="short_conv", states=(State(shape=shape, role="conv"),)),)

    def _channels(self) -> Axis:
        return Axis(label="the channels of the convolution", units=self.channels)
