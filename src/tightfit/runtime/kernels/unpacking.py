"""Stored codes to 16-bit numbers, in registers; a few integer instructions for two at a time.

Codes are put where bfloat16 or float16 have exponent and mantissa, as Marlin does (vLLM's
`csrc/quantization/marlin/dequant.h`): int4 in the mantissa of 128 or 1024, e2m1 and e4m3 with their
own small exponents, which a multiplication corrects.
"""

import os
from dataclasses import dataclass

import triton
import triton.language as tl

_ASM = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
"""Triton's interpreter knows neither assembly nor bfloat16: it gets the same in Python's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """Of 16 bits: the bits of a number whose last mantissa bit counts 1, that number, where the
    codes of e2m1 and e4m3 begin, and what they are to be multiplied by there."""

    ones: int
    one_count: float
    fp4_at: int
    fp4_unit: float
    fp8_at: int
    fp8_unit: float


_FORMATS = {
    "bf16": _Format(
        ones=0x4300, one_count=128.0, fp4_at=6, fp4_unit=2.0**126, fp8_at=4, fp8_unit=2.0**120
    ),
    "fp16": _Format(
        ones=0x6400, one_count=1024.0, fp4_at=9, fp4_unit=2.0**14, fp8_at=7, fp8_unit=2.0**8
    ),
}


@triton.constexpr_function
def number(dtype, name):
    """A number of the 16-bit format that Triton's `dtype` is."""
    return getattr(_FORMATS[dtype.name], name)


@triton.constexpr_function
def _pair(bits):
    return f"0x{bits << 16 | bits:08x}"


@triton.constexpr_function
def _int4_asm(dtype):
    ones = _pair(_FORMATS[dtype.name].ones)
    return f"""{{
    .reg .b32 t;
    prmt.b32 t, $2, 0, 0x4140;
    lop3.b32 $0, t, 0x000f000f, {ones}, 0xEA;
    shr.u32 t, t, 4;
    lop3.b32 $1, t, 0x000f000f, {ones}, 0xEA;
    }}"""


@triton.constexpr_function
def _fp4_asm(dtype):
    # Bytes become the upper ones, so that the sign of the upper code is in its place.
    at = _FORMATS[dtype.name].fp4_at
    move = f"shr.u32 m, t, {8 - at};" if at < 8 else f"shl.b32 m, t, {at - 8};"
    return f"""{{
    .reg .b32 t, m, s;
    prmt.b32 t, $2, 0, 0x1404;
    {move}
    and.b32 m, m, {_pair(7 << at)};
    shl.b32 s, t, 4;
    lop3.b32 $0, s, 0x80008000, m, 0xEA;
    shr.u32 m, t, {12 - at};
    and.b32 m, m, {_pair(7 << at)};
    lop3.b32 $1, t, 0x80008000, m, 0xEA;
    }}"""


@triton.constexpr_function
def _fp8_asm(dtype):
    at = _FORMATS[dtype.name].fp8_at
    return f"""{{
    .reg .b32 t, m;
    prmt.b32 t, $1, 0, 0x1404;
    shr.u32 m, t, {8 - at};
    and.b32 m, m, {_pair(0x7F << at)};
    lop3.b32 $0, t, 0x80008000, m, 0xEA;
    }}"""


@triton.constexpr_function
def _int8_asm(dtype, signed):
    flip = "xor.b32 t, $1, 0x80808080;" if signed else "mov.b32 t, $1;"
    if dtype.name == "fp16":
        # 1024 + code, less 1152.
        return f"""{{
    .reg .b32 t, m;
    {flip}
    prmt.b32 t, t, 0x64646464, 0x4140;
    mov.b32 m, 0x64806480;
    sub.f16x2 $0, t, m;
    }}"""
    # bfloat16 has too few bits for that: 2^23 + code in float32, of which the upper half is enough.
    return f"""{{
    .reg .b32 t;
    .reg .f32 a, b;
    .reg .b32 i, j;
    {flip}
    prmt.b32 i, t, 0x4b000000, 0x7650;
    prmt.b32 j, t, 0x4b000000, 0x7651;
    mov.b32 a, i;
    mov.b32 b, j;
    sub.f32 a, a, 0f4B000080;
    sub.f32 b, b, 0f4B000080;
    mov.b32 i, a;
    mov.b32 j, b;
    prmt.b32 $0, i, j, 0x7632;
    }}"""


@triton.jit
def times(values, factor, WIDE: tl.constexpr = False):
    """16-bit `values * factor`, rounded once; `WIDE` factors may be out of the range of float16."""
    if _ASM and (values.dtype == tl.bfloat16 or not WIDE):
        result = values * factor.to(values.dtype)
    else:
        result = (values.to(tl.float32) * factor.to(tl.float32)).to(values.dtype)
    return result


@triton.jit
def minus(values, subtrahend):
    """16-bit `values - subtrahend`."""
    if _ASM:
        result = values - subtrahend.to(values.dtype)
    else:
        result = (values.to(tl.float32) - subtrahend.to(tl.float32)).to(values.dtype)
    return result


@triton.jit
def int4_codes(packed, DTYPE: tl.constexpr):
    """Lower and upper codes of bytes, each 128 (bfloat16) or 1024 (float16) too large."""
    if _ASM:
        low, high = tl.inline_asm_elementwise(
            _int4_asm(DTYPE),
            "=r,=r,r",
            [packed],
            dtype=(DTYPE.value, DTYPE.value),
            is_pure=True,
            pack=2,
        )
    else:
        ones: tl.constexpr = number(DTYPE, "ones")
        low = ((packed & 15).to(tl.uint16) | ones).to(DTYPE, bitcast=True)
        high = ((packed >> 4).to(tl.uint16) | ones).to(DTYPE, bitcast=True)
    return low, high


@triton.jit
def fp4_values(packed, DTYPE: tl.constexpr):
    """Lower and upper e2m1 numbers of bytes."""
    if _ASM:
        low, high = tl.inline_asm_elementwise(
            _fp4_asm(DTYPE),
            "=r,=r,r",
            [packed],
            dtype=(DTYPE.value, DTYPE.value),
            is_pure=True,
            pack=2,
        )
    else:
        at: tl.constexpr = number(DTYPE, "fp4_at")
        wide = packed.to(tl.uint16)
        low = (((wide & 8) << 12) | ((wide & 7) << at)).to(DTYPE, bitcast=True)
        high = (((wide & 128) << 8) | (((wide >> 4) & 7) << at)).to(DTYPE, bitcast=True)
    unit: tl.constexpr = number(DTYPE, "fp4_unit")
    units = tl.full(low.shape, unit, tl.float32)
    return times(low, units), times(high, units)


@triton.jit
def fp8_values(packed, DTYPE: tl.constexpr):
    """The e4m3 numbers of bytes; NaN becomes 480."""
    if _ASM:
        values = tl.inline_asm_elementwise(
            _fp8_asm(DTYPE), "=r,r", [packed], dtype=DTYPE.value, is_pure=True, pack=2
        )
    else:
        at: tl.constexpr = number(DTYPE, "fp8_at")
        wide = packed.to(tl.uint16)
        values = (((wide & 128) << 8) | ((wide & 127) << at)).to(DTYPE, bitcast=True)
    unit: tl.constexpr = number(DTYPE, "fp8_unit")
    return times(values, tl.full(values.shape, unit, tl.float32))


@triton.jit
def int8_values(codes, DTYPE: tl.constexpr):
    """Signed bytes as numbers; unsigned ones less 128."""
    SIGNED: tl.constexpr = codes.dtype == tl.int8
    if _ASM:
        values = tl.inline_asm_elementwise(
            _int8_asm(DTYPE, SIGNED), "=r,r", [codes], dtype=DTYPE.value, is_pure=True, pack=2
        )
    elif SIGNED:
        values = codes.to(tl.float32).to(DTYPE)
    else:
        values = (codes.to(tl.float32) - 128.0).to(DTYPE)
    return values


@triton.jit
def scale_values(stored, SCALE: tl.constexpr):
    """Scales as float32: `floats` as they are, bytes of `e4m3`, or of `e8m0`, powers of two."""
    if SCALE == "e8m0":
        result = (stored.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        wide = stored.to(tl.int32)
        bits = ((wide & 128) << 24) | ((wide & 127) << 20)
        result = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        result = stored.to(tl.float32)
    return result
