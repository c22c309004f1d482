"""GPTQ: columns are rounded one by one, and those still to come make up for the error.

(Frantar et al. 2022, arXiv 2210.17323.) Rows are independent of each other, so that a matrix can be
given some rows at a time.
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.codecs import Codec, Scales
from tightfit.codecs.floats import Fp8Block
from tightfit.quantize.calibration.scales import least_weighted_error

DAMPING = 0.05
"""Of the mean of the diagonal, added to it: with 8000 tokens better than 0.01, on other texts."""
_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Hessian:
    """What all rows share.

    `upper`, float32 `[columns, columns]`, is the upper Cholesky factor of the inverse of the damped
    Gram matrix of the inputs, whose columns are in `order`: the most important ones first. Groups
    stay as they are, so that no format has to know (what others call static act-order).
    """

    order: Tensor
    upper: Tensor


def hessian(gram: Tensor, *, damping: float = DAMPING, by_importance: bool = True) -> Hessian:
    """Prepare a Gram matrix, float32 `[columns, columns]`.

    The factor is the inverse of an upper R with H = R R^T, and R is the Cholesky factor of H with
    its columns backwards, backwards again: one inversion less than by the inverse of H. No more
    than three matrices of that size are in memory, the given one included.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean().clamp(min=1e-20)
    order = torch.arange(len(gram))
    if by_importance:
        order = torch.argsort(diagonal, descending=True, stable=True)
    backwards = order.flip(0)
    while True:
        damped = gram[backwards][:, backwards]
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damping *= 4
    del damped
    inverse = torch.eye(len(gram))
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    upper = inverse.flip(0, 1)
    return Hessian(order=order, upper=upper)


def gptq(
    coder: Codec, matrix: Tensor, hessian: Hessian, amax: Tensor | None = None
) -> tuple[Tensor, Scales]:
    """Codes, float32 `[rows, columns]`, and scales of some rows.

    Scales are found before the first column is rounded. An error of a column costs its square
    divided by that of the diagonal of `upper`, after all others have made up for it.

    Args:
        coder: of the scheme.
        matrix: float32 `[rows, columns]`.
        hessian: of its inputs.
        amax: as in `Codec.scales`.
    """
    order, upper = hessian.order, hessian.upper
    costs = torch.empty(len(order))
    costs[order] = upper.diagonal() ** -2
    scales = least_weighted_error(coder, matrix, costs, amax)
    grid = _Grid(coder, scales, matrix)
    # Columns become rows, so that each is in one piece.
    left = matrix.T[order]
    codes = torch.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        corner = upper[start:stop, start:stop]
        for i, index in enumerate(order[start:stop].tolist()):
            column = left[start + i].addmv(errors[:i].T, corner[:i, i], alpha=-1)
            codes[start + i], values = grid.nearest(index, column)
            torch.sub(column, values, out=errors[i]).div_(corner[i, i])
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    left[order] = codes
    return left.T.contiguous(), scales


class _Grid:
    """Rounds one column at a time, by a codec whose groups are single columns."""

    def __init__(self, coder: Codec, scales: Scales, matrix: Tensor) -> None:
        rows, columns = matrix.shape
        self._size = coder.group_size or columns
        factor = scales.factor
        if len(factor) != rows:
            each = coder.block if isinstance(coder, Fp8Block) else rows
            factor = factor.repeat_interleave(each, dim=0)[:rows]
        self._coder = copy(coder)
        self._coder.group_size = 1
        if isinstance(self._coder, Fp8Block):
            self._coder.block = 1
        groups = factor.T.contiguous().unsqueeze(-1)
        zeros: list[Tensor | None] = [None] * len(groups)
        if scales.zero is not None:
            zeros = list(scales.zero.T.contiguous().unsqueeze(-1))
        self._groups = [
            Scales(factor=one, stored=one, zero=zero)
            for one, zero in zip(groups, zeros, strict=True)
        ]

    def nearest(self, index: int, column: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values of the numbers in a column, `[rows]` each."""
        scales = self._groups[index // self._size]
        codes = self._coder.codes(column.clone().unsqueeze(-1), scales)
        return codes[:, 0], self._coder.values(codes, scales)[:, 0]
