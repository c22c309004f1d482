"""RMS norms of rows and of heads, in one read and one write; float32 inside."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(
    x,
    delta,
    weight,
    out,
    scale,
    eps,
    heads,
    features: tl.constexpr,
    x_row,
    x_head,
    delta_row,
    ADDS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row, head = (program // heads).to(tl.int64), program % heads
    column = tl.arange(0, BLOCK)
    inside = column < features
    x += row * x_row + head * x_head
    kept = tl.load(x + column, mask=inside, other=0.0)
    if ADDS:
        added = tl.load(delta + row * delta_row + column, mask=inside, other=0.0)
        # Rounded first, since the norm is of what the residual stream holds.
        kept = (kept.to(tl.float32) + scale * added.to(tl.float32)).to(kept.dtype)
        tl.store(x + column, kept, mask=inside)
    values = kept.to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, axis=0) / features + eps)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weights += 1.0
    place = out + program.to(tl.int64) * features
    tl.store(place + column, (values * factor * weights).to(kept.dtype), mask=inside)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    unit_offset: bool,
    delta: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`x / rms(x) * weight` over the last dimension, or `* (1 + weight)`.

    Args:
        x: [rows, features] or [rows, heads, features], any strides but that of features.
        weight: [features].
        eps: added to the mean of squares.
        unit_offset: whether weights count from 1.
        delta: [rows, features]: first `x += scale * delta`, in place; x has no heads then.
        scale: of `delta`.

    Returns:
        A new tensor of x's shape.
    """
    features = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    assert x.stride(-1) == 1
    assert delta is None or (delta.shape == x.shape and x.dim() == 2 and delta.stride(1) == 1)
    block = triton.next_power_of_2(features)
    _rms_norm[(len(x) * heads,)](
        x,
        x if delta is None else delta,
        weight,
        out,
        scale,
        eps,
        heads,
        features,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        0 if delta is None else delta.stride(0),
        ADDS=delta is not None,
        UNIT_OFFSET=unit_offset,
        BLOCK=block,
        num_warps=warps(block),
    )
    return out


@triton.jit
def _sum_of_squares(x, features: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, features, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = tl.load(x + column, mask=column < features, other=0.0).to(tl.float32)
        total += values * values
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["tokens"])
def _sums_of_squares(
    q,
    k,
    out,
    q_row,
    k_row,
    tokens,
    q_features: tl.constexpr,
    k_features: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        tl.store(out + token, _sum_of_squares(q + token * q_row, q_features, BLOCK))
    else:
        tl.store(out + tokens + token, _sum_of_squares(k + token * k_row, k_features, BLOCK))


def sums_of_squares(q: Tensor, k: Tensor) -> Tensor:
    """Of all heads of queries and of keys together: float32 [2, tokens].

    Args:
        q: [tokens, heads, head_dim], of which the heads of a token are adjacent.
        k: like `q`, of the same dtype.
    """
    tokens = len(q)
    out = torch.empty(2, tokens, dtype=torch.float32, device=q.device)
    if not tokens:
        return out
    q_features, k_features = q.shape[1] * q.shape[2], k.shape[1] * k.shape[2]
    assert q.stride(1) == k.stride(1) == q.shape[2]
    _sums_of_squares[(tokens, 2)](
        q, k, out, q.stride(0), k.stride(0), tokens, q_features, k_features, BLOCK=1024, num_warps=4
    )
    return out


def warps(block: int) -> int:
    """Warps for a row of `block` features: 8 features per thread, as 16 bytes of bfloat16."""
    return min(max(block // 256, 1), 16)
