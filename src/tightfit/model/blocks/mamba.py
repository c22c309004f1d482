"""Mamba: a gated convolution and a selective state space, of the first or the second kind.

Cuts are those of vLLM's `model_executor/layers/mamba/mamba_mixer.py` and `mamba_mixer2.py`, states
those of its `mamba_utils.py` (`MambaStateShapeCalculator`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tightfit.model.blocks.base import Mixer, Place
from tightfit.model.blocks.linear import column_parallel, row_parallel, vector
from tightfit.model.cache import Cache, State, StateCache
from tightfit.model.layout import Axis, Cut, Part, Rank, Stage, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba1(Mixer):
    """Mamba: every channel has its own decay for every element of its state."""

    intermediate_size: int
    state_size: int
    conv_kernel: int
    time_step_rank: int
    bias: bool = False
    conv_bias: bool = True
    norms: bool = False
    """Norms with weights of the time step, B and C: Jamba."""
    module: str = "mixer"
    ssm_dtype: str | None = None
    """The dtype of the recurrent state, where the config gives one."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """Everything is dealt by channel; `x_proj` and `out_proj` read channels.

        vLLM builds them without the quantization of the rest.
        """
        for weight in self._weights(place):
            yield replace(weight, linear=False) if weight.linear else weight

    def _weights(self, place: Place) -> Iterator[Weight]:
        at, inner = place.inside(self.module), self._channels()
        yield from projection(
            f"{at.prefix}.in_proj",
            (inner, inner),
            columns=place.hidden_size,
            where=place.where,
            bias=self.bias,
        )
        yield from convolution(
            f"{at.prefix}.conv1d", (inner,), self.conv_kernel, where=at.where, bias=self.conv_bias
        )
        yield from row_parallel(
            f"{at.prefix}.x_proj",
            inner,
            rows=self.time_step_rank + 2 * self.state_size,
            where=place.where,
        )
        yield from column_parallel(
            f"{at.prefix}.dt_proj", inner, columns=self.time_step_rank, where=at.where, bias=True
        )
        yield Weight(
            name=f"{at.prefix}.A",
            parts=(Part(source=f"{at.prefix}.A_log", rows=inner.rows, axis=inner),),
            columns=self.state_size,
            cut=Cut.OUTPUT,
            where=place.where,
            engine_dtype="F32",
            decay=True,
        )
        yield dealt(f"{at.prefix}.D", inner, at.where)
        yield from row_parallel(
            f"{at.prefix}.out_proj", inner, rows=place.hidden_size, where=at.where, bias=self.bias
        )
        if self.norms:
            sizes = {"dt": self.time_step_rank, "b": self.state_size, "c": self.state_size}
            for name, size in sizes.items():
                yield vector(f"{at.prefix}.{name}_layernorm.weight", size, place.where)

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """The last inputs of the convolution, and a state for each channel."""
        channels = self._channels().span(rank)[1]
        return (
            StateCache(
                kind="mamba1",
                states=(
                    State(shape=(self.conv_kernel - 1, channels), role="conv"),
                    State(shape=(channels, self.state_size), role="ssm", dtype=self.ssm_dtype),
                ),
            ),
        )

    def _channels(self) -> Axis:
        return Axis(label="the channels of Mamba", units=self.intermediate_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2(Mixer):
    """Mamba 2: a decay for each head; groups of heads share B and C."""

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    bias: bool = False
    conv_bias: bool = True
    gated_norm: bool = True
    """The output is normalized with a weight: not in most Falcon-H1."""
    module: str = "mixer"
    ssm_dtype: str | None = None
    """The dtype of the recurrent state, where the model gives one."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """`in_proj` gives the gate, x, B, C and the time step, and is cut in each of them."""
        at = place.inside(self.module)
        heads, inner, groups = self._heads(1), self._heads(self.head_dim), self._groups()
        yield from projection(
            f"{at.prefix}.in_proj",
            (inner, inner, groups, groups, heads),
            columns=place.hidden_size,
            where=place.where,
            bias=self.bias,
        )
        yield from convolution(
            f"{at.prefix}.conv1d",
            (inner, groups, groups),
            self.conv_kernel,
            where=place.where,
            bias=self.conv_bias,
        )
        yield Weight(
            name=f"{at.prefix}.A",
            parts=(Part(source=f"{at.prefix}.A_log", rows=heads.rows, axis=heads),),
            cut=Cut.OUTPUT,
            where=place.where,
            engine_dtype="F32",
            decay=True,
        )
        yield dealt(f"{at.prefix}.D", heads, place.where)
        yield dealt(f"{at.prefix}.dt_bias", heads, place.where)
        if self.gated_norm:
            yield dealt(f"{at.prefix}.norm.weight", inner, place.where)
        yield from row_parallel(
            f"{at.prefix}.out_proj", inner, rows=place.hidden_size, where=at.where, bias=self.bias
        )

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """The last inputs of the convolution, and a matrix for each head."""
        heads = self._heads(1).span(rank)[1]
        inputs = heads * self.head_dim + 2 * self._groups().span(rank)[1]
        shape = (heads, self.head_dim, self.state_size)
        return (
            StateCache(
                kind="mamba2",
                states=(
                    State(shape=(self.conv_kernel - 1, inputs), role="conv"),
                    State(shape=shape, role="ssm", dtype=self.ssm_dtype),
                ),
            ),
        )

    def _heads(self, unit_rows: int) -> Axis:
        return Axis(label="the heads of Mamba", units=self.num_heads, unit_rows=unit_rows)

    def _groups(self) -> Axis:
        """One group goes to every rank; vLLM refuses ranks that do not divide several."""
        alone = self.num_groups == 1
        return Axis(
            label="n_groups",
            units=self.num_groups,
            unit_rows=self.state_size,
            groups=1 if alone else None,
            replicated=alone,
        )


def projection(
    name: str, axes: tuple[Axis, ...], *, columns: int, where: int | Stage, bias: bool
) -> Iterator[Weight]:
    """A column parallel layer, one tensor in the checkpoint, that is cut in each of its parts."""
    parts = rows_of(f"{name}.weight", axes)
    yield Weight(
        name=f"{name}.weight",
        parts=parts,
        columns=columns,
        cut=Cut.OUTPUT,
        where=where,
        linear=True,
    )
    if bias:
        parts = rows_of(f"{name}.bias", axes)
        yield Weight(name=f"{name}.bias", parts=parts, cut=Cut.OUTPUT, where=where)


def convolution(
    name: str, axes: tuple[Axis, ...], kernel: int, *, where: int | Stage, bias: bool
) -> Iterator[Weight]:
    """A depthwise convolution, stored as `[channels, 1, kernel]`."""
    channels = sum(axis.rows for axis in axes)
    yield Weight(
        name=f"{name}.weight",
        parts=rows_of(f"{name}.weight", axes),
        columns=kernel,
        cut=Cut.OUTPUT,
        stored_shape=(channels, 1, kernel),
        where=where,
    )
    if bias:
        parts = rows_of(f"{name}.bias", axes)
        yield Weight(name=f"{name}.bias", parts=parts, cut=Cut.OUTPUT, where=where)


def rows_of(source: str, axes: tuple[Axis, ...]) -> tuple[Part, ...]:
    """Consecutive rows of one checkpoint tensor, each dealt by an axis of its own."""
    total = sum(axis.rows for axis in axes)
    found: list[Part] = []
    for axis in axes:
        first = sum(part.rows for part in found)
        found.append(
            Part(source=source, rows=axis.rows, axis=axis, first_row=first, source_rows=total)
        )
    return tuple(found)


def dealt(name: str, axis: Axis, where: int | Stage) -> Weight:
    """A vector whose elements are dealt."""
    part = Part(source=name, rows=axis.rows, axis=axis)
    return Weight(name=name, parts=(part,), cut=Cut.OUTPUT, where=where)
