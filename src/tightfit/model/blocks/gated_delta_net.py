"""Gated delta net: linear attention whose state forgets by head and is corrected by the delta rule.

Qwen3-Next, Qwen3.5 and OLMo Hybrid. Cuts are those of vLLM's `layers/mamba/gdn`
(`qwen_gdn_linear_attn.py`, `olmo_gdn_linear_attn.py`), states those of `mamba_utils.py`
(`gated_delta_net_state_shape`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.base import Mixer, Place
from tightfit.model.blocks.linear import column_parallel, linear, row_parallel, stack, vector
from tightfit.model.blocks.mamba import convolution, dealt, projection, rows_of
from tightfit.model.cache import Cache, State, StateCache
from tightfit.model.layout import Axis, Cut, Part, Rank, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNet(Mixer):
    """Every key head serves `num_v_heads / num_k_heads` value heads."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel: int
    interleaved: bool
    """The checkpoint interleaves queries, keys, values and gates by key head (Qwen3-Next), where
    others store `in_proj_qkv`, `in_proj_z`, `in_proj_b` and `in_proj_a`."""
    module: str = "linear_attn"
    ssm_dtype: str | None = None
    """The dtype of the recurrent state, where the config gives one."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """`in_proj_qkvz`, `in_proj_ba`, the convolution, and what follows the recurrence."""
        at = place.inside(self.module)
        keys, values, heads = self._keys(), self._values(self.head_v_dim), self._values(1)
        inputs = self._interleaved(at) if self.interleaved else self._separate(at)
        yield from inputs
        yield from convolution(
            f"{at.prefix}.conv1d",
            (keys, keys, values),
            self.conv_kernel,
            where=place.where,
            bias=False,
        )
        yield dealt(f"{at.prefix}.dt_bias", heads, place.where)
        yield Weight(
            name=f"{at.prefix}.A_log",
            parts=(Part(source=f"{at.prefix}.A_log", rows=heads.rows, axis=heads),),
            cut=Cut.OUTPUT,
            where=place.where,
            engine_dtype="F32",
        )
        yield vector(f"{at.prefix}.norm.weight", self.head_v_dim, place.where)
        yield from row_parallel(
            f"{at.prefix}.out_proj", values, rows=place.hidden_size, where=place.where
        )

    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """The last inputs of the convolution, and a matrix for each value head."""
        heads = self._values(1).span(rank)[1]
        channels = 2 * self._keys().span(rank)[1] + heads * self.head_v_dim
        shape = (heads, self.head_v_dim, self.head_k_dim)
        return (
            StateCache(
                kind="gdn",
                states=(
                    State(shape=(self.conv_kernel - 1, channels), role="conv"),
                    State(shape=shape, role="ssm", dtype=self.ssm_dtype),
                ),
            ),
        )

    def _keys(self, unit_rows: int | None = None) -> Axis:
        rows = unit_rows or self.head_k_dim
        return Axis(label="linear_num_key_heads", units=self.num_k_heads, unit_rows=rows)

    def _values(self, unit_rows: int) -> Axis:
        return Axis(label="linear_num_value_heads", units=self.num_v_heads, unit_rows=unit_rows)

    def _interleaved(self, at: Place) -> Iterator[Weight]:
        each = self.num_v_heads // self.num_k_heads
        widths = {"qkvz": 2 * self.head_k_dim + 2 * each * self.head_v_dim, "ba": 2 * each}
        for name, width in widths.items():
            yield from projection(
                f"{at.prefix}.in_proj_{name}",
                (self._keys(width),),
                columns=at.hidden_size,
                where=at.where,
                bias=False,
            )

    def _separate(self, at: Place) -> Iterator[Weight]:
        keys, values, heads = self._keys(), self._values(self.head_v_dim), self._values(1)
        members = {
            "qkvz": (("qkv", (keys, keys, values)), ("z", (values,))),
            "ba": (("b", (heads,)), ("a", (heads,))),
        }
        for name, sources in members.items():
            yield Weight(
                name=f"{at.prefix}.in_proj_{name}.weight",
                parts=tuple(
                    part
                    for source, axes in sources
                    for part in rows_of(f"{at.prefix}.in_proj_{source}.weight", axes)
                ),
                columns=at.hidden_size,
                cut=Cut.OUTPUT,
                where=at.where,
                linear=True,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OlmoDeltaNet(GatedDeltaNet):
    """The same, whose checkpoint has a matrix and a convolution for each input: OLMo Hybrid."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """`in_proj_qkvg`, the gates of each head, the convolutions, and what follows.

        vLLM holds the convolutions as one.
        """
        at, where = place.inside(self.module), place.where
        keys, values, heads = self._keys(), self._values(self.head_v_dim), self._values(1)
        members = {"q": keys, "k": keys, "v": values, "g": values}
        yield from linear(
            f"{at.prefix}.in_proj_qkvg",
            stack(at.prefix, None, tuple((f"{n}_proj", axis) for n, axis in members.items())),
            columns=place.hidden_size,
            cut=Cut.OUTPUT,
            where=where,
            bias=False,
        )
        for name in ("b_proj", "a_proj"):
            yield from column_parallel(
                f"{at.prefix}.{name}", heads, columns=place.hidden_size, where=where
            )
        for name in ("q", "k", "v"):
            yield from convolution(
                f"{at.prefix}.{name}_conv1d",
                (members[name],),
                self.conv_kernel,
                where=where,
                bias=False,
            )
        for name in ("dt_bias", "A_log"):
            yield dealt(f"{at.prefix}.{name}", heads, where)
        yield vector(f"{at.prefix}.o_norm.weight", self.head_v_dim, where)
        yield from row_parallel(f"{at.prefix}.o_proj", values, rows=place.hidden_size, where=where)
