"""A rank's tensor, and the boxes of checkpoint tensors that fill it."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from tightfit.errors import CheckpointError
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


def element(value: float, dtype: str) -> bytes:
    """The bytes of one element."""
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack({"F32": "<f", "F16": "<e"}[dtype], value)


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
    optional: bool = False
    """Checkpoints may lack sources of it; of pieces for the same place the first is taken."""

    def settled(self, shapes: Mapping[str, tuple[int, ...]]) -> "RankTensor":
        """With the pieces that a checkpoint has, and the shapes that its tensors have there.

        Scales may be `[]`, `[1]` or `[1, 1]`, and those of rows `[n]` or `[n, 1]`: boxes see them
        as the engine does.

        Args:
            shapes: of the checkpoint's tensors; one that is not there stays as it was expected.

        Raises:
            CheckpointError: a tensor has more or fewer elements than are expected of it.
        """
        pieces: dict[tuple[int, ...], Piece] = {}
        for number, piece in enumerate(self.pieces):
            if self.optional and piece.source not in shapes:
                continue
            shape = shapes.get(piece.source, piece.source_shape)
            if shape != piece.source_shape:
                view = piece.source_shape if piece.view is None else piece.view
                if prod(view) != prod(shape):
                    raise CheckpointError(
                        f"{piece.source!r} has the shape {list(shape)}, and {self.name!r} is made "
                        f"of one of {list(view)}",
                        hint="the checkpoint was exported in a way that is not known, or is "
                        "damaged; download it again",
                    )
                piece = replace(piece, view=view, source_shape=shape)
            pieces.setdefault(piece.at if self.optional else (number,), piece)
        fill = 0.0 if pieces else self.fill
        return replace(self, pieces=tuple(pieces.values()), fill=fill, optional=False)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return dtype_bytes(self.dtype, prod(self.shape))
