"""Decay rates of Mamba: the only values that an engine holds otherwise than the checkpoint.

Checkpoints have the logarithm, `A_log`. vLLM computes `-exp(x)` in float32 while it loads a
checkpoint (`layers/mamba/mamba_mixer.py`), but takes sharded files as they are.
"""

import math
import struct

_BF16, _FORMATS = "BF16", {"F32": "f", "F16": "e"}
RATES_OF = (_BF16, *_FORMATS)
"""The dtypes that the logarithms may have."""


def decay_rates(data: bytes, dtype: str) -> bytes:
    """`-exp(x)` in float32 of BF16, F16 or F32 values.

    The exponential is that of double precision, rounded once; vLLM's own may be off by one unit in
    the last place.
    """
    if dtype == _BF16:
        count = len(data) // 2
        wide = bytearray(4 * count)
        wide[2::4], wide[3::4] = data[::2], data[1::2]
        values = struct.unpack(f"<{count}f", wide)
    else:
        kind = _FORMATS[dtype]
        count = len(data) // struct.calcsize(kind)
        values = struct.unpack(f"<{count}{kind}", data)
    return struct.pack(f"<{count}f", *map(_rate, values))


def _rate(value: float) -> float:
    # Beyond it float32 has no finite value, and packing would refuse.
    return -math.exp(value) if not value > 88.7 else -math.inf
