"""Norms of query and key heads and their rotation, in place, in one kernel; float32 inside.

A program has several heads of one token. It holds the first and the second features of the pairs
apart, so that a warp writes only what it has read itself.
"""

import triton
import triton.language as tl
from torch import Tensor

from tightfit.runtime.rope import HeadNorms, Rotation

_PAIRS = 512
"""Of a program, where there are so many: 8 for each of 64 threads, as 16 bytes of bfloat16."""


@triton.jit
def _weights(
    q_weight,
    k_weight,
    head,
    q_heads,
    heads,
    at,
    inside,
    PER_HEAD: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Of some features `at` of every head: float32 [heads, features]."""
    of_query = (head < q_heads)[:, None]
    q_at = (head * PER_HEAD)[:, None] + at[None, :]
    k_at = ((head - q_heads) * PER_HEAD)[:, None] + at[None, :]
    inside = inside[None, :] & (head < heads)[:, None]
    q = tl.load(q_weight + q_at, mask=inside & of_query, other=0.0).to(tl.float32)
    k = tl.load(k_weight + k_at, mask=inside & ~of_query, other=0.0).to(tl.float32)
    return q + k + OFFSET


# Their alignment and evenness change from step to step, and each would be a kernel of its own.
@triton.jit(do_not_specialize=["positions", "tokens"])
def _rotate(
    x,
    table,
    positions,
    q_weight,
    k_weight,
    squares,
    eps,
    tokens,
    token_stride,
    head_stride,
    heads,
    q_heads,
    q_features,
    k_features,
    HAS_POSITIONS: tl.constexpr,
    NORM: tl.constexpr,
    PER_HEAD: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    pair = tl.arange(0, HALF_BLOCK)
    row = token
    if HAS_POSITIONS:
        row = tl.load(positions + token).to(tl.int64)
    angles = table + row * (2 * HALF) + pair
    cos = tl.load(angles, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(angles + HALF, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]

    if INTERLEAVED:
        first_at, second_at = 2 * pair, 2 * pair + 1
    else:
        first_at, second_at = pair, HALF + pair
    x += token * token_stride + (head * head_stride)[:, None]
    inside = (head < heads)[:, None] & (pair < HALF)[None, :]
    stored = tl.load(x + first_at[None, :], mask=inside, other=0.0)
    first = stored.to(tl.float32)
    second = tl.load(x + second_at[None, :], mask=inside, other=0.0).to(tl.float32)

    if NORM != "":
        if REST > 0:
            rest_at = 2 * HALF + tl.arange(0, REST_BLOCK)
            in_rest = rest_at < 2 * HALF + REST
            rest_inside = (head < heads)[:, None] & in_rest[None, :]
            rest = tl.load(x + rest_at[None, :], mask=rest_inside, other=0.0).to(tl.float32)
        if NORM == "full":
            of_queries = tl.load(squares + token) / q_features
            of_keys = tl.load(squares + tokens + token) / k_features
            mean = tl.where(head < q_heads, of_queries, of_keys)
        else:
            total = tl.sum(first * first + second * second, axis=1)
            if REST > 0:
                total += tl.sum(rest * rest, axis=1)
            mean = total / (2 * HALF + REST)
        factor = tl.rsqrt(mean + eps)[:, None]
        first *= factor * _weights(
            q_weight, k_weight, head, q_heads, heads, first_at, pair < HALF, PER_HEAD, OFFSET
        )
        second *= factor * _weights(
            q_weight, k_weight, head, q_heads, heads, second_at, pair < HALF, PER_HEAD, OFFSET
        )
        if REST > 0:
            rest *= factor * _weights(
                q_weight, k_weight, head, q_heads, heads, rest_at, in_rest, PER_HEAD, OFFSET
            )
            tl.store(x + rest_at[None, :], rest.to(stored.dtype), mask=rest_inside)

    rotated = first * cos - second * sin
    tl.store(x + first_at[None, :], rotated.to(stored.dtype), mask=inside)
    rotated = second * cos + first * sin
    tl.store(x + second_at[None, :], rotated.to(stored.dtype), mask=inside)


def rotate_(
    x: Tensor, rotation: Rotation | None, *, q_heads: int = 0, norms: HeadNorms | None = None
) -> None:
    """Normalize heads, if asked to, and rotate their first features, in place.

    Args:
        x: [tokens, heads, head_dim], any strides but that of features: first the heads of queries,
            then those of keys, if there are norms.
        rotation: of the tokens, if they are rotated.
        q_heads: how many heads are those of queries, which only norms want to know.
        norms: what is done before.
    """
    tokens, heads, head_dim = x.shape
    if not x.numel():
        return
    table, positions, half, interleaved = x, None, 0, False
    if rotation is not None:
        table, positions, interleaved = rotation.rows, rotation.positions, rotation.interleaved
        half = table.shape[1] // 2
        assert table.is_contiguous()
    rest = head_dim - 2 * half
    assert x.stride(2) == 1
    half_block = triton.next_power_of_2(max(half, 1))
    heads_block = min(triton.next_power_of_2(heads), max(_PAIRS // half_block, 1))
    kind, per_head, offset = "", 0, 0.0
    q_weight = k_weight = squares = x
    if norms is not None:
        kind = "head" if norms.squares is None else "full"
        q_weight, k_weight = norms.q_weight, norms.k_weight
        squares = x if norms.squares is None else norms.squares
        assert q_weight.is_contiguous()
        assert k_weight.is_contiguous()
        per_head = head_dim if q_weight.dim() == 2 else 0
        offset = float(norms.unit_offset)
    _rotate[(tokens, triton.cdiv(heads, heads_block))](
        x,
        table,
        x if positions is None else positions,
        q_weight,
        k_weight,
        squares,
        0.0 if norms is None else norms.eps,
        tokens,
        x.stride(0),
        x.stride(1),
        heads,
        q_heads,
        *((1, 1) if norms is None else norms.features),
        HAS_POSITIONS=positions is not None,
        NORM=kind,
        PER_HEAD=per_head,
        OFFSET=offset,
        INTERLEAVED=interleaved,
        HALF=half,
        REST=rest,
        HEADS_BLOCK=heads_block,
        HALF_BLOCK=half_block,
        REST_BLOCK=triton.next_power_of_2(max(rest, 1)),
        num_warps=max(heads_block * half_block // 256, 1),
    )
