"""Bytes and tensor dtypes: sizes are `int` bytes everywhere, and GiB (2**30) only at the edge."""

import math
import re

from tightfit.errors import UsageError

KiB = 2**10
MiB = 2**20
GiB = 2**30

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of every dtype that a safetensors header may name (safetensors' `Dtype`)."""

TORCH_DTYPES: dict[str, str] = {
    "float32": "F32",
    "float": "F32",
    "float16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
}
"""The names that `config.json` and the `--dtype` option use, as safetensors spells them."""

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?b?|b)?\s*", re.IGNORECASE)
_POWERS = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def dtype_bytes(dtype: str, elements: int = 1) -> int:
    """Bytes of `elements` elements of a safetensors dtype; sub-byte dtypes are packed."""
    return (DTYPE_BITS[dtype] * elements + 7) // 8


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return -(-a // b)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not less than `n`."""
    return cdiv(n, multiple) * multiple


def parse_bytes(text: str) -> int:
    """Read a size such as `24GiB`, `5GB` (decimal), `300MiB` or plain bytes.

    Raises:
        UsageError: the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    size = math.inf
    if match is not None:
        unit = (match[2] or "").lower()
        size = float(match[1]) * (1024 if "i" in unit else 1000) ** _POWERS[unit[:1]]
    if not math.isfinite(size):
        raise UsageError(
            f"{text!r} is not a size", hint="write it as 24GiB, 5GB (= 5e9 bytes) or plain bytes"
        )
    return int(size)


def parse_tokens(text: str) -> int:
    """Read a token count as vLLM does: `32k` is 32,000 and `32K` is 32,768.

    Raises:
        UsageError: the text is not a whole number with an optional k, m, g, K, M or G.
    """
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", text.strip())
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": KiB, "M": MiB, "G": GiB}
    value = float(match[1]) * scale[match[2]] if match else math.nan
    if not value.is_integer():
        raise UsageError(
            f"{text!r} is not a number of tokens", hint="write it as 8192, 8k (8,000) or 8K (8,192)"
        )
    return int(value)


def parse_memory(text: str) -> int:
    """Read a size as vLLM does, `8g` for 8e9 and `8G` for 8 GiB, or one with its whole unit.

    Raises:
        UsageError: the text is not a size.
    """
    return (
        parse_tokens(text) if re.fullmatch(r"[\d.]+[kmgKMG]", text.strip()) else parse_bytes(text)
    )


def format_bytes(n: int) -> str:
    """Show bytes for people: `15.0 GiB`, `312 MiB`, `17 B`."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if abs(n) >= unit:
            value = n / unit
            digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
            return f"{value:.{digits}f} {name}"
    return f"{n} B"
