"""Gemma 3n's alternating updates of parallel hidden states, and its learned residual."""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.linear import column_parallel, norm, replicated, row_parallel, vector
from tightfit.model.layout import Axis, Stage, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class AltUp(Block):
    """Predicts `inputs` hidden states of which one is computed, and corrects the others."""

    inputs: int

    def weights(self, place: Place) -> Iterator[Weight]:
        """Small matrices, whole on every rank; vLLM keeps the scale in float32."""
        at, where, hidden = place.inside("altup").prefix, place.where, place.hidden_size
        square = self.inputs**2
        yield from replicated(
            f"{at}.correction_coefs", rows=self.inputs, columns=self.inputs, where=where
        )
        yield from replicated(
            f"{at}.prediction_coefs", rows=square, columns=self.inputs, where=where
        )
        yield from replicated(
            f"{at}.modality_router", rows=self.inputs, columns=hidden, where=where
        )
        yield from norm(f"{at}.router_norm", hidden, where)
        yield vector(f"{at}.correct_output_scale", hidden, where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Laurel(Block):
    """A residual of low rank beside attention."""

    rank: int

    def weights(self, place: Place) -> Iterator[Weight]:
        """`linear_left`, `linear_right` and the norm after them."""
        at, where, hidden = place.inside("laurel").prefix, place.where, place.hidden_size
        inner = Axis(label="laurel_rank", units=self.rank)
        yield from column_parallel(f"{at}.linear_left", inner, columns=hidden, where=where)
        yield from row_parallel(f"{at}.linear_right", inner, rows=hidden, where=where)
        yield from norm(f"{at}.post_laurel_norm", hidden, where)


def altup_projections(prefix: str, inputs: int, hidden_size: int) -> Iterator[Weight]:
    """The matrices that make the parallel hidden states, and join them in the end."""
    axis = Axis(label="hidden_size", units=hidden_size)
    for name, where in (
        ("altup_projections", Stage.FIRST),
        ("altup_unembed_projections", Stage.LAST),
    ):
        for i in range(inputs - 1):
            yield from column_parallel(
                f"{prefix}.{name}.{i}", axis, columns=hidden_size, where=where
            )
