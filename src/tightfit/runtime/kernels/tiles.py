"""The shapes of the attention kernels: what one program takes at once."""

from dataclasses import dataclass

from tightfit.planner.engines.builtin_paged import MAX_ROWS, class_of
from tightfit.units import KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one program takes at once, and how Triton compiles it.

    A row is one query head of one token; those that share a KV head are rows of the same tile.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


H100_SHARED_BYTES = 232448
"""What one program can have there."""

_DECODE = {
    64: (64, 4, 3),
    128: (32, 2, 3),
    256: (32, 4, 3),
    1024: (32, 8, 3),
}
"""By the features of a head at most: keys, warps and stages of 16-bit computation."""

_PREFILL = {
    64: Tile(rows=128, keys=128, num_warps=8, num_stages=3),
    128: Tile(rows=64, keys=64, num_warps=4, num_stages=3),
    256: Tile(rows=64, keys=64, num_warps=8, num_stages=3),
    1024: Tile(rows=64, keys=32, num_warps=8, num_stages=2),
}
_SMALLER: dict[int, tuple[tuple[int, Tile], ...]] = {
    256: (
        (224 * KiB, Tile(rows=64, keys=64, num_warps=8, num_stages=2)),
        (104 * KiB, Tile(rows=64, keys=32, num_warps=8, num_stages=2)),
    ),
    1024: ((144 * KiB, Tile(rows=64, keys=16, num_warps=8, num_stages=2)),),
}
"""By the same, for GPUs with less shared memory than this, such as A100 (163 KiB) and those of
workstations (99 KiB): what Triton compiles for them takes 104 and 68 KiB, and 92."""


def decode_tile(group: int, head_dim: int, itemsize: int) -> Tile:
    """The tile of one new token, whose `group` query heads share a KV head.

    Tensor cores take 16 rows at least; `itemsize` is that of an element of the queries.
    """
    rows = min(MAX_ROWS, max(16, ceil_power_of_two(group)))
    if itemsize > 2:
        return Tile(rows=min(rows, 32), keys=16, num_warps=4, num_stages=2)
    keys, num_warps, num_stages = _DECODE[class_of(head_dim)]
    return Tile(rows=rows, keys=keys, num_warps=num_warps, num_stages=num_stages)


def prefill_tile(head_dim: int, itemsize: int, shared_bytes: int = H100_SHARED_BYTES) -> Tile:
    """The tile of many new tokens, on a GPU that gives a program so much shared memory."""
    if itemsize > 2:
        return Tile(rows=32, keys=16, num_warps=4, num_stages=2)
    found = _PREFILL[class_of(head_dim)]
    for less_than, smaller in _SMALLER.get(class_of(head_dim), ()):
        if shared_bytes < less_than:
            found = smaller
    return found


def ceil_power_of_two(value: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (value - 1).bit_length()
