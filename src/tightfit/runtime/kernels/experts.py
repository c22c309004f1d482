"""Mixtures of experts: all experts of a layer in four kernels, whose grids the host knows.

Assignments of tokens to experts are sorted by expert, and each expert's are filled up to whole
blocks (vLLM's `csrc/moe/moe_align_sum_kernels.cu`); a grid has as many blocks as there could be at
most, and those that there are not end at once. So nothing waits for the device.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.planner.engines.builtin_quantized import CUDA_EXPERT_BLOCK
from tightfit.runtime.kernels.gated import activated
from tightfit.runtime.kernels.matmul import Blocks, blocks_for
from tightfit.runtime.kernels.packed import Packed
from tightfit.runtime.kernels.products import product

_SORTED = 2048
_TOGETHER = tl.constexpr(16)
"""Blocks of assignments whose tiles are worked at side by side, so that the blocks of an expert
find its weights in the cache, and all tiles of a block its inputs."""


@triton.jit(do_not_specialize=["count"])
def _sort(
    experts,
    order,
    block_experts,
    count,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    expert = tl.program_id(0)
    bin = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], dtype=tl.int32)
    for first in range(0, count, TILE):
        i = first + tl.arange(0, TILE)
        chosen = tl.load(experts + i, mask=i < count, other=0).to(tl.int32)
        counts += tl.histogram(chosen, EXPERTS, mask=i < count)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where(bin < expert, blocks, 0), axis=0)
    my_blocks = tl.sum(tl.where(bin == expert, blocks, 0), axis=0)
    for block in range(first_block, first_block + my_blocks):
        tl.store(block_experts + 1 + block, expert)
    if expert == 0:
        tl.store(block_experts, tl.sum(blocks, axis=0))
    place = first_block * BLOCK_M
    for first in range(0, count, TILE):
        i = first + tl.arange(0, TILE)
        mine = tl.load(experts + i, mask=i < count, other=-1).to(tl.int32) == expert
        ranks = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(order + place + ranks - 1, i, mask=mine)
        place += tl.max(ranks, axis=0)
    rest = place + tl.arange(0, BLOCK_M)
    tl.store(order + rest, count, mask=rest < (first_block + my_blocks) * BLOCK_M)


@triton.jit(do_not_specialize=["count", "max_blocks"])
def _experts(
    x,
    weight,
    scales,
    zeros,
    row_scales,
    x_scales,
    bias,
    shares,
    order,
    block_experts,
    out,
    count,
    outputs,
    columns,
    scale_row,
    weight_stride,
    scales_stride,
    max_blocks,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALTERNATING: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    ZEROS: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    X_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    SHARES: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    FEATURES: tl.constexpr = BLOCK_N if ACTIVATION == "" else BLOCK_N // 2
    features = outputs if ACTIVATION == "" else outputs // 2
    together = tl.cdiv(features, FEATURES) * _TOGETHER
    first_block = tl.program_id(0) // together * _TOGETHER
    blocks = tl.minimum(max_blocks - first_block, _TOGETHER)
    place = tl.program_id(0) % together
    block = first_block + place % blocks
    tile = place // blocks
    if block < tl.load(block_experts):
        expert = tl.load(block_experts + 1 + block).to(tl.int64)
        assigned = tl.load(order + block * BLOCK_M + tl.arange(0, BLOCK_M))
        m_mask = assigned < count
        i = tl.arange(0, BLOCK_N)
        if ACTIVATION == "":
            feature = tile * BLOCK_N + i
            n = feature
        else:
            # A thread has rows r and r + 8 of a product: a gate and its up.
            feature = tile * FEATURES + i // 16 * 8 + i % 8
            n = feature * 2 + i // 8 % 2 if ALTERNATING else feature + i // 8 % 2 * features
        n_mask = feature < features
        if not EVEN:
            n = tl.where(n_mask, n, 0)
        rows = tl.where(m_mask, assigned // TOP_K, 0)
        total = product(
            x,
            rows.to(tl.int64) * columns,
            m_mask,
            weight + expert * weight_stride,
            n,
            n_mask,
            scales + expert * scales_stride,
            zeros + expert * scales_stride,
            scale_row,
            columns,
            0,
            columns,
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
        n_at = expert * outputs + n
        if ROW_SCALES:
            total *= tl.load(row_scales + n_at, mask=n_mask, other=0.0)[:, None]
        if X_SCALES:
            total *= tl.load(x_scales + rows, mask=m_mask, other=0.0)[None, :]
        if BIAS:
            total += tl.load(bias + n_at, mask=n_mask, other=0.0).to(tl.float32)[:, None]
        if SHARES:
            total *= tl.load(shares + assigned, mask=m_mask, other=0.0)[None, :]
        if ACTIVATION != "":
            pairs = tl.reshape(total, [BLOCK_N // 16, 2, 8, BLOCK_M])
            gate, up = tl.split(tl.permute(pairs, [0, 2, 3, 1]))
            active, up = activated(gate, up, ACTIVATION)
            total = tl.reshape(active * up, [FEATURES, BLOCK_M])
            feature = tile * FEATURES + tl.arange(0, FEATURES)
            n_mask = feature < features
        at = out + assigned[:, None].to(tl.int64) * features + feature[None, :]
        result = tl.trans(total).to(out.dtype.element_ty)
        tl.store(at, result, mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def _add_up(x, out, features, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    x += token * TOP_K * features + column
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(TOP_K):
        total += tl.load(x + i * features, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * features + column, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignments:
    """Assignments of tokens to experts, sorted by expert, in blocks of the same expert."""

    order: Tensor
    """int32 [max_blocks * block], of token * top_k + choice; where a block is not full, of as many
    as there are assignments."""
    block_experts: Tensor
    """int32 [1 + max_blocks]: how many blocks there are, and the expert of each."""
    count: int
    block: int
    max_blocks: int


def assign(experts: Tensor, num_experts: int, block: int) -> Assignments:
    """Sort assignments.

    Args:
        experts: integers [tokens, top_k], contiguous.
        num_experts: of the layer.
        block: assignments of a block, a power of two.
    """
    count = experts.numel()
    blocks = max_blocks(count, num_experts, block)
    order = torch.empty(blocks * block, dtype=torch.int32, device=experts.device)
    block_experts = torch.empty(1 + blocks, dtype=torch.int32, device=experts.device)
    _sort[(num_experts,)](
        experts,
        order,
        block_experts,
        count,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_M=block,
        TILE=min(_SORTED, max(128, triton.next_power_of_2(count))),
        num_warps=4,
    )
    return Assignments(
        order=order, block_experts=block_experts, count=count, block=block, max_blocks=blocks
    )


def max_blocks(count: int, num_experts: int, block: int) -> int:
    """Blocks that `count` assignments fill or begin, at most."""
    return (count + min(count, num_experts) * (block - 1)) // block


def grouped_matmul(
    x: Tensor,
    weight: Packed,
    assignments: Assignments,
    *,
    top_k: int,
    activation: str = "",
    alternating: bool = False,
    bias: Tensor | None = None,
    shares: Tensor | None = None,
    x_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Each assignment's row times the weight of its expert.

    Args:
        x: contiguous [assignments / top_k, columns]: 16-bit floats, int8 or e4m3 with scales, or
            float32 if the weight is.
        weight: of all experts.
        assignments: sorted, in blocks of `blocks.m`.
        top_k: assignments that share a row.
        activation: of `kernels.gated`, if the outputs are gates and ups.
        alternating: every gate is followed by its up.
        bias: [experts, outputs].
        shares: float32 [assignments], what results are multiplied by.
        x_scales: float32, of each row, what results are multiplied by.
        dtype: of the result, where it is not that of `x`.
        blocks: to be measured.

    Returns:
        [assignments, outputs], or half as many with an activation.
    """
    outputs, columns = weight.outputs, weight.columns
    features = outputs // 2 if activation else outputs
    out = torch.empty(assignments.count, features, dtype=dtype or x.dtype, device=x.device)
    native = x.itemsize == 1
    blocks = blocks or expert_blocks(assignments.block, weight, native=native)
    assert blocks.m == assignments.block
    assert x.is_contiguous()
    values, scales, zeros = weight.tensors()
    if native:
        values = values.view(x.dtype)
    per_program = blocks.n // 2 if activation else blocks.n
    tiles = triton.cdiv(features, per_program)
    _experts[(assignments.max_blocks * tiles,)](
        x,
        values,
        scales,
        zeros,
        x if weight.row_scales is None else weight.row_scales,
        x if x_scales is None else x_scales,
        x if bias is None else bias,
        x if shares is None else shares,
        assignments.order,
        assignments.block_experts,
        out,
        assignments.count,
        outputs,
        columns,
        scales.shape[-1],
        values.stride(0),
        scales.stride(0),
        assignments.max_blocks,
        TOP_K=top_k,
        ACTIVATION=activation,
        ALTERNATING=alternating,
        KIND="native" if native else weight.kind,
        GROUP=weight.group_size,
        SCALE_ROWS=weight.scale_rows,
        SCALE=weight.scale,
        ZEROS=weight.zeros is not None,
        ROW_SCALES=weight.row_scales is not None,
        X_SCALES=x_scales is not None,
        BIAS=bias is not None,
        SHARES=shares is not None,
        EVEN=columns % blocks.k == 0 and features % per_program == 0,
        BLOCK_N=blocks.n,
        BLOCK_M=blocks.m,
        BLOCK_K=blocks.k,
        STAGES=blocks.num_stages,
        num_warps=blocks.num_warps,
        maxnreg=blocks.registers,
    )
    return out


def add_up(x: Tensor, top_k: int, out: Tensor) -> None:
    """Sum the rows of each token: [tokens * top_k, features] into `out` [tokens, features]."""
    features = x.shape[1]
    block = min(1024, triton.next_power_of_2(features))
    _add_up[(len(out), triton.cdiv(features, block))](
        x, out, features, TOP_K=top_k, BLOCK=block, num_warps=4
    )


def block_for(assignments: int, num_experts: int, dtype: torch.dtype) -> int:
    """Assignments of a block: as many as an expert has on average, within reason."""
    most = 16 if dtype == torch.float32 else CUDA_EXPERT_BLOCK
    return min(most, max(16, triton.next_power_of_2(assignments // num_experts)))


def expert_blocks(m: int, weight: Packed, *, native: bool) -> Blocks:
    """What is fastest on an H100 for blocks of `m` assignments; 8 bits times 8 bits if `native`."""
    bits = weight.bits
    if bits == 32:
        return Blocks(n=32, m=m, k=32, num_warps=4, num_stages=2)
    if m == 128:
        if native:
            return Blocks(n=128, m=m, k=128, num_warps=8, num_stages=4)
        if bits == 4:
            return Blocks(n=128, m=m, k=64, num_warps=4, num_stages=4)
        # Two programs share a multiprocessor's registers.
        return Blocks(n=128, m=m, k=64, num_warps=8, num_stages=3, registers=128)
    if m == 64 and bits == 16:
        return Blocks(n=128, m=m, k=64, num_warps=8, num_stages=3)
    if m == 32 and bits == 4:
        return Blocks(n=128, m=m, k=64, num_warps=4, num_stages=4)
    return blocks_for(m, bits, native=native)
