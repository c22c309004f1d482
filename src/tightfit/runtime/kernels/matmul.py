"""Linear layers whose weights are quantized: one kernel that unpacks them in registers.

Few tokens are bound by reading the weight, so that many programs share its inputs; the last of
those that share a tile adds up, in a fixed order, what all of them left in a workspace. For many
tokens it pays to decode some rows at a time for cuBLAS.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.planner.engines.builtin_quantized import (
    CUDA_DECODED_ELEMENTS,
    CUDA_DECODED_ROWS,
    CUDA_SPLIT_ELEMENTS,
    CUDA_SPLIT_PROGRAMS,
)
from tightfit.runtime.kernels.packed import Packed
from tightfit.runtime.kernels.products import group_tiles, product, weight_tile

_SPLIT_COLUMNS = 1024
"""Inputs that a program adds up at least, where several share a tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """What a program takes at once, and how Triton compiles it."""

    n: int
    m: int
    k: int
    num_warps: int
    num_stages: int
    registers: int | None = None
    """Of a thread, at most."""


@triton.jit(do_not_specialize=["tokens"])
def _matmul(
    x,
    weight,
    scales,
    zeros,
    row_scales,
    x_scales,
    bias,
    out,
    workspace,
    counters,
    tokens,
    outputs,
    columns,
    per_split,
    scale_row,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    ZEROS: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    X_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    m_tiles = tl.cdiv(tokens, BLOCK_M)
    n = tile // m_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n_mask = n < outputs
    m_mask = m < tokens
    first = split * per_split
    total = product(
        x,
        m.to(tl.int64) * columns,
        m_mask,
        weight,
        tl.minimum(n, outputs - 1) if not EVEN else n,
        n_mask,
        scales,
        zeros,
        scale_row,
        columns,
        first,
        tl.minimum(first + per_split, columns),
        KIND,
        GROUP,
        SCALE_ROWS,
        SCALE,
        ZEROS,
        EVEN,
        BLOCK_N,
        BLOCK_M,
        BLOCK_K,
        STAGES,
    ).to(tl.float32)
    last = True
    if SPLITS > 1:
        place = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        parts = workspace + tile * (SPLITS * BLOCK_M * BLOCK_N) + place
        mask = n_mask[:, None] & m_mask[None, :]
        tl.store(parts + split * (BLOCK_M * BLOCK_N), total, mask=mask)
        tl.debug_barrier()
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            for other in range(SPLITS):
                # Not from the first-level cache, which knows nothing of other multiprocessors.
                total += tl.load(
                    parts + other * (BLOCK_M * BLOCK_N), mask=mask, other=0.0, cache_modifier=".cg"
                )
            tl.store(counters + tile, 0)
    if last:
        if ROW_SCALES:
            total *= tl.load(row_scales + n, mask=n_mask, other=0.0)[:, None]
        if X_SCALES:
            total *= tl.load(x_scales + m, mask=m_mask, other=0.0)[None, :]
        if BIAS:
            total += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
        at = out + m[:, None].to(tl.int64) * outputs + n[None, :]
        result = tl.trans(total).to(out.dtype.element_ty)
        tl.store(at, result, mask=m_mask[:, None] & n_mask[None, :])


@triton.jit(do_not_specialize=["first_row", "rows"])
def _decode(
    weight,
    scales,
    zeros,
    row_scales,
    out,
    first_row,
    rows,
    columns,
    scale_row,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    ZEROS: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NIBBLES: tl.constexpr = KIND == "int4" or KIND == "fp4"
    PER_BYTE: tl.constexpr = 2 if NIBBLES else 1
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K
    byte = tl.arange(0, BLOCK_K // PER_BYTE)
    column = byte
    if NIBBLES:
        column = byte // 16 * 32 + byte % 16
    inside = (row < rows)[:, None] & (column < columns - k)[None, :]
    chunk = tl.arange(0, BLOCK_K // 32) * 32
    n = first_row + row
    at = n[:, None].to(tl.int64) * (columns // PER_BYTE) + (k // PER_BYTE + byte)[None, :]
    lower_scale, upper_scale, zero = k, k, k
    if GROUP > 0:
        lower_scale, upper_scale, zero = group_tiles(
            scales,
            zeros,
            scale_row,
            n,
            (row < rows)[:, None] & (chunk < columns - k)[None, :],
            k,
            KIND,
            GROUP,
            SCALE_ROWS,
            ZEROS,
            BLOCK_K,
        )
    lower, upper = weight_tile(
        tl.load(weight + at, mask=inside, other=0),
        lower_scale,
        upper_scale,
        zero,
        KIND,
        GROUP,
        SCALE,
        ZEROS,
        out.dtype.element_ty,
    )
    if ROW_SCALES:
        factor = tl.load(row_scales + n, mask=row < rows, other=0.0)[:, None]
        lower = (lower.to(tl.float32) * factor).to(lower.dtype)
        upper = (upper.to(tl.float32) * factor).to(upper.dtype)
    out_at = out + row[:, None].to(tl.int64) * columns + (k + column)[None, :]
    tl.store(out_at, lower, mask=inside)
    if NIBBLES:
        tl.store(out_at + 16, upper, mask=inside)


def matmul(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None = None,
    *,
    x_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    blocks: Blocks | None = None,
    splits: int | None = None,
) -> Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: contiguous [tokens, columns], 16-bit floats, or int8 or e4m3 with `x_scales`.
        weight: a matrix; of 8 bits and the dtype of `x` if that has 8 bits.
        bias: [outputs].
        x_scales: float32 [tokens, 1], what results are multiplied by.
        dtype: of the result, where it is not that of `x`.
        blocks: to be measured.
        splits: to be measured.

    Returns:
        [tokens, outputs].
    """
    tokens, outputs, columns = len(x), weight.outputs, weight.columns
    out = torch.empty(tokens, outputs, dtype=dtype or x.dtype, device=x.device)
    if not out.numel():
        return out
    assert x.is_contiguous()
    blocks = blocks or blocks_for(tokens, weight.bits, native=x.itemsize == 1)
    tiles = triton.cdiv(outputs, blocks.n) * triton.cdiv(tokens, blocks.m)
    if splits is None:
        programs = min(CUDA_SPLIT_PROGRAMS, CUDA_SPLIT_ELEMENTS // (blocks.n * blocks.m))
        splits = max(1, min(programs // tiles, columns // _SPLIT_COLUMNS))
    per_split = triton.cdiv(triton.cdiv(columns, splits), blocks.k) * blocks.k
    splits = triton.cdiv(columns, per_split)
    workspace = out
    if splits > 1:
        elements = tiles * splits * blocks.n * blocks.m
        workspace = torch.empty(elements, dtype=torch.float32, device=x.device)
    values, scales, zeros = weight.tensors()
    if x.itemsize == 1:
        values = values.view(x.dtype)
    _matmul[(tiles, splits)](
        x,
        values,
        scales,
        zeros,
        x if weight.row_scales is None else weight.row_scales,
        x if x_scales is None else x_scales,
        x if bias is None else bias,
        out,
        workspace,
        counters(x.device) if splits > 1 else out,
        tokens,
        outputs,
        columns,
        per_split,
        scales.shape[-1],
        KIND="native" if x.itemsize == 1 else weight.kind,
        GROUP=weight.group_size,
        SCALE_ROWS=weight.scale_rows,
        SCALE=weight.scale,
        ZEROS=weight.zeros is not None,
        ROW_SCALES=weight.row_scales is not None,
        X_SCALES=x_scales is not None,
        BIAS=bias is not None,
        EVEN=columns % blocks.k == 0 and outputs % blocks.n == 0,
        SPLITS=splits,
        BLOCK_N=blocks.n,
        BLOCK_M=blocks.m,
        BLOCK_K=blocks.k,
        STAGES=blocks.num_stages,
        num_warps=blocks.num_warps,
    )
    return out


def decoded_matmul(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """The same for 16-bit inputs, by cuBLAS with some rows of the weight at a time."""
    outputs, columns = weight.outputs, weight.columns
    out = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
    step = max(1, CUDA_DECODED_ELEMENTS // columns // CUDA_DECODED_ROWS) * CUDA_DECODED_ROWS
    some = torch.empty(min(step, outputs), columns, dtype=x.dtype, device=x.device)
    for first in range(0, outputs, step):
        rows = some[: outputs - first]
        decode(weight, first, rows)
        torch.mm(x, rows.T, out=out[:, first : first + step])
    return out if bias is None else out.add_(bias)


def decode(weight: Packed, first: int, out: Tensor) -> None:
    """Decode rows from `first` on into `out`, 16-bit floats [rows, columns], contiguous."""
    rows, columns = out.shape
    values, scales, zeros = weight.tensors()
    block_n, block_k = 32, 128
    _decode[(triton.cdiv(rows, block_n), triton.cdiv(columns, block_k))](
        values,
        scales,
        zeros,
        values if weight.row_scales is None else weight.row_scales,
        out,
        first,
        rows,
        columns,
        scales.shape[-1],
        KIND=weight.kind,
        GROUP=weight.group_size,
        SCALE_ROWS=weight.scale_rows,
        SCALE=weight.scale,
        ZEROS=weight.zeros is not None,
        ROW_SCALES=weight.row_scales is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
    )


def blocks_for(tokens: int, bits: int, *, native: bool) -> Blocks:
    """What is fastest on an H100.

    Args:
        tokens: of a step, or of a block of assignments to experts.
        bits: of a weight.
        native: 8 bits times 8 bits.
    """
    if tokens <= 16 and bits == 4:
        return Blocks(n=64, m=16, k=256, num_warps=4, num_stages=3)
    if tokens <= 32 or (native and tokens <= 64):
        m = max(16, triton.next_power_of_2(tokens))
        return Blocks(n=64, m=m, k=128, num_warps=4, num_stages=4)
    if native:
        return Blocks(n=128, m=128, k=128, num_warps=8, num_stages=3)
    # Two of these share a multiprocessor: its registers are enough for 128 bytes of both.
    return Blocks(n=128, m=64, k=128 if bits == 4 else 64, num_warps=8, num_stages=4)


@lru_cache(maxsize=8)
def counters(device: torch.device) -> Tensor:
    """How many programs are done with each tile; the last one of a tile sets it back to 0."""
    return torch.zeros(CUDA_SPLIT_PROGRAMS, dtype=torch.int32, device=device)
