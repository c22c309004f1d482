"""Kimi delta attention: a delta rule whose state forgets by feature, behind short convolutions.

Cuts are those of vLLM's `models/kimi_k3/nvidia/kda.py` and `layers/mamba/gdn/
kimi_gdn_linear_attn.py`, states those of `mamba_utils.py` (`kda_state_shape`). Left out are up to
15 rows of zeros that align the fused projection, and a transposed copy of the convolution that
some decode kernels want.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.base import Mixer, Place
from tightfit.model.blocks.linear import column_parallel, replicated, row_parallel, vector
from tightfit.model.cache import Cache, State, StateCache
from tightfit.model.layout import Axis, Cut, Part, Rank, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiDeltaAttention(Mixer):
    """Queries, keys and values have as many heads, of the same size."""

    num_heads: int
    head_dim: int
    conv_kernel: int
    full_rank_gate: bool = False
    """The output's gate is one matrix (Kimi-K3), and not two of a low rank (Kimi Linear)."""
    module: str = "self_attn"

    def weights(self, place: Place) -> Iterator[Weight]:
        """`in_proj_qkvgfab`, whose forget gate's first half is whole on every rank."""
        at, where = place.inside(self.module), place.where
        inner, heads = self._heads(self.head_dim), self._heads(1)
        forget = Axis(label="head_dim", units=1, unit_rows=self.head_dim, groups=1, replicated=True)
        members = [(f"{name}_proj", inner) for name in "qkv"]
        if self.full_rank_gate:
            members += [("g_proj", inner), ("f_a_proj", forget), ("b_proj", heads)]
        else:
            members += [("b_proj", heads), ("f_a_proj", forget)]
        yield Weight(
            name=f"{at.prefix}.in_proj_qkvgfab.weight",
            parts=tuple(
                Part(source=f"{at.prefix}.{name}.weight", rows=axis.rows, axis=axis)
                for name, axis in members
            ),
            columns=place.hidden_size,
            cut=Cut.OUTPUT,
            where=where,
            linear=True,
        )
        yield from column_parallel(
            f"{at.prefix}.f_b_proj", inner, columns=self.head_dim, where=where
        )
        yield from self._small(at, inner, heads)
        if not self.full_rank_gate:
            yield from replicated(
                f"{at.prefix}.g_a_proj",
                rows=self.head_dim,
                columns=place.hidden_size,
                where=where,
            )
            yield from column_parallel(
                f"{at.prefix}.g_b_proj", inner, columns=self.head_dim, where=where
            )
        yield vector(f"{at.prefix}.o_norm.weight", self.head_dim, where)
        yield from row_parallel(f"{at.prefix}.o_proj", inner, rows=place.hidden_size, where=where)

    def _small(self, at: Place, inner: Axis, heads: Axis) -> Iterator[Weight]:
        """What vLLM holds in float32: the convolution, the bias of the forget gate, the decay."""
        yield Weight(
            name=f"{at.prefix}.conv1d.weight",
            parts=tuple(
                Part(source=f"{at.prefix}.{name}_conv1d.weight", rows=inner.rows, axis=inner)
                for name in "qkv"
            ),
            columns=self.conv_kernel,
            cut=Cut.OUTPUT,
            stored_shape=(inner.rows, 1, self.conv_kernel),
            where=at.where,
            engine_dtype="F32",
        )
        shapes = {"dt_bias": (inner, None), "A_log": (heads, (1, 1, self.num_heads, 1))}
        for name, (axis, shape) in shapes.items():
            yield Weight(
                name=f"{at.prefix}.{name}",
                parts=(Part(source=f"{at.prefix}.{name}", rows=axis.rows, axis=axis),),
                cut=Cut.OUTPUT,
                stored_shape=shape,
                where=at.where,
                engine_dtype="F32",
            )

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """The last inputs of the convolutions, and a float32 matrix for each head."""
        heads = self._heads(1).span(rank)[1]
        channels = 3 * heads * self.head_dim
        shape = (heads, self.head_dim, self.head_dim)
        return (
            StateCache(
                kind="kda",
                states=(
                    State(shape=(self.conv_kernel - 1, channels), role="conv"),
                    State(shape=shape, role="ssm", dtype="F32"),
                ),
            ),
        )

    def _heads(self, unit_rows: int) -> Axis:
        return Axis(label="the heads of KDA", units=self.num_heads, unit_rows=unit_rows)
