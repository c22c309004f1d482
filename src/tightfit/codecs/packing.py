"""Small codes in bytes and 32-bit words, the first one in the lowest bits."""

from functools import lru_cache

import torch
from torch import Tensor

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's places of eight consecutive outputs in a word."""
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of them is."""


def to_bytes(values: Tensor) -> Tensor:
    """Whole numbers from 0 to 255, float32 -> uint8.

    By way of int8: torch converts floats to uint8 several times slower.
    """
    return (values - 128).to(torch.int8).view(torch.uint8).bitwise_xor_(128)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 `[..., columns]` of 4 bits each -> uint8 `[..., columns / 2]`."""
    pairs = _contiguous(codes).view(torch.int16)
    return pairs.bitwise_or(pairs >> 4).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 `[..., n]` -> uint8 `[..., 2 n]`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[..., columns]` -> int32 `[..., columns * bits / 32]`, for 4 or 8 bits."""
    data = pack_nibbles(codes) if bits == 4 else _contiguous(codes)
    return data.view(torch.int32)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 `[..., n]` -> uint8 `[..., 32 n / bits]`."""
    data = _contiguous(words).view(torch.uint8)
    return unpack_nibbles(data) if bits == 4 else data


def awq_order(codes: Tensor) -> Tensor:
    """Eight by eight along the last dimension, in AutoAWQ's order; `awq_reorder` undoes it."""
    return _reordered(codes, _AWQ_ORDER)


def awq_reorder(codes: Tensor) -> Tensor:
    """Outputs in their own order again."""
    return _reordered(codes, _AWQ_PLACES)


def _reordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    places = _indices(order, codes.device)
    return codes.unflatten(-1, (-1, 8)).index_select(-1, places).flatten(-2)


@lru_cache(maxsize=8)
def _indices(order: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: nothing can be copied from the host while a CUDA graph is captured."""
    return torch.tensor(order, device=device)


def _contiguous(tensor: Tensor) -> Tensor:
    """With strides that other dtypes can be seen under, also those of dimensions of one element."""
    return tensor.reshape(-1).view(tensor.shape)
