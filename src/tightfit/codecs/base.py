"""What all codecs have in common: scales of groups, codes on a grid, and stored tensors.

Encoding is three steps that calibrated methods take one by one: `scales` of a matrix, `codes` on
the grid that they span, and `pack` to what a checkpoint holds. Everything is computed with the
scales as they are stored, so that no error comes from rounding them afterwards.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Stored = Mapping[str, Tensor]
"""What a checkpoint holds of one matrix, by kind: `weight_packed`, `weight_scale`, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Scales of the groups of a matrix.

    `factor`, float32 `[rows, groups]`, is what codes are multiplied by (`[1, 1]` if all have the
    same), `stored` what a checkpoint holds of it, and `zero`, shaped like `factor`, the code that
    means 0 where a grid is not symmetric.
    """

    factor: Tensor
    stored: Tensor
    zero: Tensor | None = None
    overall: Tensor | None = None
    """What the scales of NVFP4 are divided by, float32 `[1]`."""

    @staticmethod
    def joined(parts: Sequence["Scales"]) -> "Scales":
        """Of consecutive groups of columns."""
        zeros = [part.zero for part in parts if part.zero is not None]
        return replace(
            parts[0],
            factor=torch.cat([part.factor for part in parts], dim=1),
            stored=torch.cat([part.stored for part in parts], dim=1),
            zero=torch.cat(zeros, dim=1) if zeros else None,
        )


class Codec(ABC):
    """The arithmetic of one scheme. Matrices are float32 `[rows, columns]`.

    Rows can be encoded a few at a time: `row_step` of them or a multiple, but for the last ones.
    """

    group_size: int = 0
    """Columns that share a scale; 0 for all of a row."""
    row_step: int = 1
    needs_amax: bool = False
    """Scales depend on the largest value of the whole matrix, and of all that is fused with it."""

    def encode(
        self, matrix: Tensor, amax: Tensor | None = None, *, search: bool = False
    ) -> dict[str, Tensor]:
        """What a checkpoint holds of some rows; `matrix` may be overwritten."""
        scales = self.scales(matrix, amax, search=search)
        return self.pack(self.scaled(matrix, scales), scales)

    @staticmethod
    def joined(pieces: Sequence[Stored]) -> dict[str, Tensor]:
        """What stands for some rows and for those after them, as one."""
        return {kind: torch.cat([piece[kind] for piece in pieces]) for kind in pieces[0]}

    def decode(self, stored: Stored) -> Tensor:
        """The matrix again, float32 `[rows, columns]`."""
        return self.values(*self.unpack(stored))

    def scales(self, matrix: Tensor, amax: Tensor | None = None, *, search: bool = False) -> Scales:
        """Scales for some rows, or for some rows and whole groups of columns.

        Args:
            matrix: float32 `[rows, columns]`.
            amax: the largest absolute value of all that shares a scale, for codecs that need it.
            search: take those with the least squared error, and not those that reach just to the
                largest value.
        """
        if not search:
            return self.candidate(matrix, amax, 1.0)
        candidates = [self.candidate(matrix, amax, share) for share in self.shares]
        return least_error(candidates, [self.errors(matrix, one) for one in candidates])

    @property
    def shares(self) -> Sequence[float]:
        """Shares of the largest value at which a search tries to let the grid end."""
        return _SHARES

    @abstractmethod
    def candidate(self, matrix: Tensor, amax: Tensor | None, share: float) -> Scales:
        """Scales with which the grid ends at a share of the largest value of each group."""

    @abstractmethod
    def codes(self, matrix: Tensor, scales: Scales) -> Tensor:
        """The nearest grid values, float32 `[rows, columns]`; `matrix` may be overwritten."""

    def scaled(self, matrix: Tensor, scales: Scales) -> Tensor:
        """What `pack` makes the same of as of `codes`, at less cost where it rounds by itself."""
        return self.codes(matrix, scales)

    @abstractmethod
    def pack(self, codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        """What a checkpoint holds."""

    @abstractmethod
    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        """Codes and scales of what a checkpoint holds."""

    def values(self, codes: Tensor, scales: Scales) -> Tensor:
        """What codes mean, float32 `[rows, columns]`."""
        grouped = self.grouped(codes)
        if scales.zero is not None:
            grouped = grouped - scales.zero[..., None]
        return (grouped * scales.factor[..., None]).view(codes.shape)

    def errors(self, matrix: Tensor, scales: Scales) -> Tensor:
        """Squared errors, summed over all that shares a scale: shaped like `scales.factor`."""
        values = self.values(self.codes(matrix.clone(), scales), scales)
        return self.grouped(values.sub_(matrix).square_()).sum(dim=-1)

    def grouped(self, matrix: Tensor) -> Tensor:
        """`[rows, groups, columns of a group]`, a view."""
        rows, columns = matrix.shape
        return matrix.view(rows, -1, self.group_size or columns)


_SHARES = (1.0, *(1.06 - 0.02 * i for i in range(34) if i != 3))


def least_error(candidates: Sequence[Scales], errors: Iterable[Tensor]) -> Scales:
    """For each group the candidate with the smallest error; the first one of equals."""
    chosen: Scales | None = None
    least = torch.empty(0)
    for one, error in zip(candidates, errors, strict=True):
        if chosen is None:
            chosen, least = one, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        chosen = replace(
            chosen,
            factor=torch.where(better, one.factor, chosen.factor),
            stored=torch.where(better.view(one.stored.shape), one.stored, chosen.stored),
            zero=None
            if one.zero is None or chosen.zero is None
            else torch.where(better, one.zero, chosen.zero),
        )
    assert chosen is not None
    return chosen


def stored_scale(scale: Tensor, dtype: torch.dtype, *, reach: float) -> Tensor:
    """A scale in the dtype of a checkpoint; 1 for groups of zeros.

    It is never rounded to 0, and its product with `reach`, the largest code, stays finite in that
    dtype.
    """
    info = torch.finfo(dtype)
    # A subnormal that still has a few bits.
    smallest = 16 * info.smallest_normal * info.eps
    largest = info.max * (1 - info.eps) / reach
    return torch.where(scale == 0, 1.0, scale.clamp(smallest, largest)).to(dtype)
