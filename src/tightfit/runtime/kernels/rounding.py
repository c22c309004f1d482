"""Rounding inputs with the arithmetic of `runtime.inputs`, in one read and one write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CODES = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}


@triton.jit
def _nearest(values):
    # Adding 1.5 * 2^23 leaves no room for a fraction: the nearest integer, of two the even one.
    return (values + 12582912.0) - 12582912.0


@triton.jit
def _e4m3(values):
    # The same with the exponent of each value, down to that of subnormal numbers.
    values = tl.minimum(tl.maximum(values, -448.0), 448.0)
    exponent = tl.maximum((values.to(tl.int32, bitcast=True) >> 23) & 255, 121)
    large = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (values + large) - large


@triton.jit(do_not_specialize=["groups"])
def _round(
    x,
    out,
    scales,
    static,
    overall,
    groups,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    EXPONENTS: tl.constexpr,
    OVERALL: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < groups)[:, None] & (column < GROUP)[None, :]
    at = row[:, None] * GROUP + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    LARGEST: tl.constexpr = 127.0 if KIND == "I8" else (448.0 if KIND == "F8_E4M3" else 6.0)
    if STATIC:
        scale = tl.zeros([ROWS], dtype=tl.float32) + tl.load(static)
    else:
        largest = tl.max(tl.abs(values), axis=1)
        if EXPONENTS:
            # `codecs.mx.to_exponents`: up to 7/4 of a power of two stays below the next one.
            TOP: tl.constexpr = 8 if KIND == "F8_E4M3" else 2
            bits = largest.to(tl.int32, bitcast=True)
            exponent = (bits >> 23) + (((bits >> 21) & 3) == 3).to(tl.int32) - TOP
            exponent = tl.where(largest > 0, tl.minimum(tl.maximum(exponent, 1), 254), 127)
            scale = (exponent << 23).to(tl.float32, bitcast=True)
        else:
            scale = tl.div_rn(largest, LARGEST)
            if OVERALL:
                whole = tl.load(overall)
                scale = tl.div_rn(_e4m3(scale * whole), tl.zeros([ROWS], dtype=tl.float32) + whole)
            scale = tl.where(scale > 0, scale, 1.0)
    spread = tl.broadcast_to(scale[:, None], [ROWS, BLOCK])
    values = tl.div_rn(values, spread)
    if KIND == "I8":
        values = tl.minimum(tl.maximum(_nearest(values), -128.0), 127.0)
    elif KIND == "F8_E4M3":
        values = _e4m3(values)
    else:
        # `codecs.grids.fp4_codes`, and back.
        size = tl.abs(values)
        code = tl.minimum(_nearest(size * 2.0), _nearest(size) + 2.0)
        code = tl.minimum(tl.minimum(code, _nearest(size * 0.5) + 4.0), 7.0)
        size = tl.maximum(tl.maximum(code * 0.5, code - 2.0), (code - 4.0) * 2.0)
        values = tl.where(values < 0, -size, size)
    if CODES:
        tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale, mask=row < groups)
    else:
        tl.store(out + at, (values * spread).to(out.dtype.element_ty), mask=inside)


def rounded_codes(x: Tensor, kind: str, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of inputs, and what they are to be multiplied by.

    Args:
        x: [tokens, inputs], contiguous.
        kind: `I8` or `F8_E4M3`.
        static: a scale of all inputs, float32 [1].

    Returns:
        [tokens, inputs] in 8 bits, and float32 scales, [tokens, 1].
    """
    out = torch.empty(x.shape, dtype=_CODES[kind], device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    _launch(x, out, scales, kind, x.shape[1], static=static, codes=True)
    return out, scales


def rounded(
    x: Tensor,
    kind: str,
    *,
    group_size: int = 0,
    exponents: bool = False,
    static: Tensor | None = None,
    overall: Tensor | None = None,
) -> Tensor:
    """What the rounded values of inputs mean, in their own dtype.

    Args:
        x: [tokens, inputs], contiguous.
        kind: `I8`, `F8_E4M3` or `F4_E2M1`.
        group_size: inputs that share a scale; 0 for all of a token.
        exponents: scales are powers of two.
        static: a scale of all inputs, float32 [1].
        overall: what NVFP4's scales were multiplied by, float32 [1].
    """
    out = torch.empty_like(x)
    size = group_size or x.shape[1]
    _launch(x, out, None, kind, size, static=static, overall=overall, exponents=exponents)
    return out


def _launch(
    x: Tensor,
    out: Tensor,
    scales: Tensor | None,
    kind: str,
    group: int,
    *,
    static: Tensor | None = None,
    overall: Tensor | None = None,
    exponents: bool = False,
    codes: bool = False,
) -> None:
    assert x.is_contiguous()
    groups = x.numel() // group
    if not groups:
        return
    block = triton.next_power_of_2(group)
    rows = max(1, 2048 // block)
    _round[(triton.cdiv(groups, rows),)](
        x,
        out,
        x if scales is None else scales,
        x if static is None else static,
        x if overall is None else overall,
        groups,
        KIND=kind,
        GROUP=group,
        STATIC=static is not None,
        EXPONENTS=exponents,
        OVERALL=overall is not None,
        CODES=codes,
        BLOCK=block,
        ROWS=rows,
        num_warps=min(max(block * rows // 512, 1), 16),
    )
