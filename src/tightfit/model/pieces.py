"""A rank's tensor, and the boxes of checkpoint tensors that fill it."""

from dataclasses import dataclass
from math import prod

from tightfit.units import dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A box of a source tensor, and the corner of the rank tensor where it lands.

    A rank tensor may have one dimension more than its sources (stacked experts): the box is then
    one element thick in that dimension.
    """

    source: str
    source_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    """In the order of the source's dimensions."""
    at: tuple[int, ...]
    view: tuple[int, ...] | None = None
    """What `start` and `shape` see the source as, where that is not `source_shape`: every other row
    is half of a row twice as long."""
    transposed: bool = False
    """The last two dimensions change places on the way: GPT-2's `[in, out]`, gpt-oss's experts."""
    decay: bool = False
    """Every element becomes `-exp(x)` in float32: the decay rates of Mamba."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTensor:
    """A tensor of one rank's files: where each element comes from, and `fill` for the others.

    `name` is what the file calls it and `parameter` what the engine does; constants that only an
    engine's file format wants have no parameter.
    """

    name: str
    parameter: str | None
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    fill: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return dtype_bytes(self.dtype, prod(self.shape))
