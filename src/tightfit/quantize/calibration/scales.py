"""Scales with the least error of what a layer gives out, not of its weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tightfit.codecs import Codec, Scales
from tightfit.codecs.base import least_error
from tightfit.codecs.floats import Fp8Block

_LARGEST_GROUP = 256
"""In wider groups each column counts by itself: their blocks would cost more than they tell."""


def least_output_error(
    coder: Codec,
    matrix: Tensor,
    gram: Tensor,
    amax: Tensor | None = None,
    shares: Sequence[float] | None = None,
) -> Scales:
    """Search scales of some rows, of which every weight is then rounded by itself.

    An error `e` of a row changes the outputs of all tokens by `e G e^T` in sum of squares, where
    `G` is the Gram matrix of the inputs. A group of columns is held against its own block of `G`.
    (That is the search for clipping of AWQ, Lin et al. 2023, arXiv 2306.00978.)

    Args:
        coder: of the scheme.
        matrix: float32 `[rows, columns]`.
        gram: float32 `[columns, columns]`, up to a factor.
        amax: as in `Codec.scales`.
        shares: of the largest values, instead of all those that the codec tries.
    """
    size = coder.group_size
    if not 0 < size <= _LARGEST_GROUP:
        return least_weighted_error(coder, matrix, gram.diagonal(), amax, shares)
    groups = len(gram) // size
    blocks = gram[: groups * size, : groups * size].view(groups, size, groups, size)
    blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def error(wrong: Tensor) -> Tensor:
        grouped = coder.grouped(wrong)
        seen = torch.bmm(grouped.transpose(0, 1), blocks).transpose(0, 1)
        return seen.mul_(grouped).sum(dim=-1)

    return _search(coder, matrix, amax, shares, error)


def least_weighted_error(
    coder: Codec,
    matrix: Tensor,
    weights: Tensor,
    amax: Tensor | None = None,
    shares: Sequence[float] | None = None,
) -> Scales:
    """The same with a weight for the squared error of each column, float32 `[columns]`."""

    def error(wrong: Tensor) -> Tensor:
        return coder.grouped(wrong.square_().mul_(weights)).sum(dim=-1)

    return _search(coder, matrix, amax, shares, error)


def _search(
    coder: Codec,
    matrix: Tensor,
    amax: Tensor | None,
    shares: Sequence[float] | None,
    error: Callable[[Tensor], Tensor],
) -> Scales:
    if isinstance(coder, Fp8Block) or len(coder.shares) == 1:
        # What shares a scale is more than some columns of a row.
        return coder.scales(matrix, amax, search=True)
    candidates = [coder.candidate(matrix, amax, share) for share in shares or coder.shares]
    return least_error(
        candidates,
        (
            error(coder.values(coder.codes(matrix.clone(), one), one).sub_(matrix))
            for one in candidates
        ),
    )
