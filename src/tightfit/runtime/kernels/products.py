"""A tile of `weight @ x.T`: what all kernels of quantized linear layers and of experts share.

The weight is the left operand, which Hopper's tensor cores take from registers: codes are unpacked
there, and nothing wider than they are goes through shared memory.
"""

import triton
import triton.language as tl

from tightfit.runtime.kernels.unpacking import (
    fp4_values,
    fp8_values,
    int4_codes,
    int8_values,
    minus,
    number,
    scale_values,
    times,
)


@triton.jit
def group_tiles(
    scales,
    zeros,
    scale_row,
    n,
    there,
    k,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What a checkpoint has of each output and of 32 columns, from column `k` on.

    That is scales, those of the upper halves of 4-bit codes, and zero points; scales again in place
    of what there is not. Arguments are those of `product`; `there` says which there are.
    """
    chunk = k + tl.arange(0, BLOCK_K // 32) * 32
    at = (n // SCALE_ROWS)[:, None] + (chunk // GROUP * scale_row)[None, :]
    lower = tl.load(scales + at, mask=there, other=0)
    upper = lower
    zero = lower
    if GROUP == 16 and (KIND == "int4" or KIND == "fp4"):
        upper = tl.load(scales + at + scale_row, mask=there, other=0)
    if ZEROS:
        zero = tl.load(zeros + at, mask=there, other=0)
    return lower, upper, zero


@triton.jit
def weight_tile(
    codes,
    lower_scale,
    upper_scale,
    zero,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    ZEROS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """16-bit numbers of a tile of codes, times the scales of groups, which are `group_tiles`.

    Two tiles of 4-bit codes: those of the lower and of the upper halves of bytes. Of others the
    second one means nothing.
    """
    NIBBLES: tl.constexpr = KIND == "int4" or KIND == "fp4"
    if KIND == "int4":
        lower, upper = int4_codes(codes, DTYPE)
        if not ZEROS:
            middle = tl.full([1, 1], 8.0 + number(DTYPE, "one_count"), tl.float32)
            lower = minus(lower, middle)
            upper = minus(upper, middle)
    elif KIND == "fp4":
        lower, upper = fp4_values(codes, DTYPE)
    elif KIND == "fp8":
        lower = fp8_values(codes, DTYPE)
        upper = lower
    elif KIND == "int8":
        lower = int8_values(codes, DTYPE)
        upper = lower
    else:
        lower = codes
        upper = lower
    if GROUP > 0:
        ROWS: tl.constexpr = codes.shape[0]
        BYTES: tl.constexpr = codes.shape[1]
        SIZE: tl.constexpr = 16 if NIBBLES else 32
        CHUNKS: tl.constexpr = BYTES // SIZE
        scale = scale_values(lower_scale, SCALE)[:, :, None]
        lower = tl.reshape(lower, [ROWS, CHUNKS, SIZE])
        upper = tl.reshape(upper, [ROWS, CHUNKS, SIZE])
        if ZEROS:
            zero = zero.to(tl.float32)
            zero = (zero + (number(DTYPE, "one_count") if KIND == "int4" else -128.0))[:, :, None]
            lower = minus(lower, zero)
            upper = minus(upper, zero)
        lower = tl.reshape(times(lower, scale, SCALE == "e8m0"), [ROWS, BYTES])
        if NIBBLES:
            if GROUP == 16:
                # Upper halves are of the next group.
                scale = scale_values(upper_scale, SCALE)[:, :, None]
            upper = tl.reshape(times(upper, scale, SCALE == "e8m0"), [ROWS, BYTES])
        else:
            upper = lower
    return lower, upper


@triton.jit
def product(
    x,
    x_rows,
    x_mask,
    weight,
    n,
    n_mask,
    scales,
    zeros,
    scale_row,
    columns,
    first,
    last,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`weight[n] @ x[rows].T` over the inputs from `first` to `last`: [BLOCK_N, BLOCK_M].

    Args:
        x: inputs, in 16 bits, in the 8 bits of the weight, or in float32 like a plain weight.
        x_rows: int64 places where rows of inputs begin; x_mask says which there are.
        weight: codes, [outputs, columns] or, of 4 bits, bytes [outputs, columns / 2], of which one
            has columns j and j + 16 of each 32.
        n: outputs, all of which can be read; n_mask says which have scales.
        scales: [groups, outputs / SCALE_ROWS], of `scale_row` elements a row.
        zeros: codes that mean 0, uint8 like `scales`.
        KIND: `plain`, `int4`, `int8` (uint8 is 128 more), `fp8` or `fp4`; or `native`, 8 bits times
            8 bits, of which integers give int32.
        GROUP: inputs that share a scale, 0 if there are none of these scales.
        EVEN: BLOCK_K divides the inputs.
    """
    NIBBLES: tl.constexpr = KIND == "int4" or KIND == "fp4"
    PER_BYTE: tl.constexpr = 2 if NIBBLES else 1
    DTYPE: tl.constexpr = x.dtype.element_ty
    INTEGERS: tl.constexpr = tl.int8 == DTYPE
    WIDE: tl.constexpr = tl.float32 == DTYPE
    byte = tl.arange(0, BLOCK_K // PER_BYTE)
    column = byte
    if NIBBLES:
        column = byte // 16 * 32 + byte % 16
    chunk = tl.arange(0, BLOCK_K // 32) * 32
    weight_at = weight + n[:, None].to(tl.int64) * (columns // PER_BYTE) + byte[None, :]
    x_at = x + x_rows[None, :] + column[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32 if INTEGERS else tl.float32)
    # The compiler copies scales ahead like codes, unless a mask leaves too few bytes at once: then
    # they are in registers one block early.
    EARLY: tl.constexpr = GROUP > 0 and not EVEN
    next_lower, next_upper, next_zero = first, first, first
    if EARLY:
        there = n_mask[:, None] & (chunk < last - first)[None, :]
        next_lower, next_upper, next_zero = group_tiles(
            scales,
            zeros,
            scale_row,
            n,
            there,
            first,
            KIND,
            GROUP,
            SCALE_ROWS,
            ZEROS,
            BLOCK_K,
        )
    for k in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        x_there = x_mask[None, :]
        if EVEN:
            codes = tl.load(weight_at + k // PER_BYTE)
        else:
            inside = column < last - k
            x_there = x_there & inside[:, None]
            codes = tl.load(weight_at + k // PER_BYTE, mask=inside[None, :], other=0.0)
        inputs = tl.load(x_at + k, mask=x_there, other=0.0)
        lower_scale, upper_scale, zero = next_lower, next_upper, next_zero
        if GROUP > 0 and EVEN:
            lower_scale, upper_scale, zero = group_tiles(
                scales,
                zeros,
                scale_row,
                n,
                n_mask[:, None],
                k,
                KIND,
                GROUP,
                SCALE_ROWS,
                ZEROS,
                BLOCK_K,
            )
        lower, upper = weight_tile(
            codes, lower_scale, upper_scale, zero, KIND, GROUP, SCALE, ZEROS, DTYPE
        )
        if EARLY:
            there = n_mask[:, None] & (chunk < last - (k + BLOCK_K))[None, :]
            next_lower, next_upper, next_zero = group_tiles(
                scales,
                zeros,
                scale_row,
                n,
                there,
                k + BLOCK_K,
                KIND,
                GROUP,
                SCALE_ROWS,
                ZEROS,
                BLOCK_K,
            )
        if INTEGERS:
            total = tl.dot(lower, inputs, total, out_dtype=tl.int32)
        elif KIND == "native":
            # Tensor cores add 8-bit floats with few bits: not more than a block's.
            total = tl.dot(lower, inputs, total, max_num_imprecise_acc=BLOCK_K)
        elif WIDE:
            total = tl.dot(lower, inputs, total, input_precision="ieee")
        else:
            total = tl.dot(lower, inputs, total)
        if NIBBLES:
            inputs = tl.load(x_at + (k + 16), mask=x_there, other=0.0)
            total = tl.dot(upper, inputs, total)
    return total
