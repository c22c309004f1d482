"""Gated activations: `activation(gate) * up`, in one read and one write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def activated(gate, up, KIND: tl.constexpr):
    """What an activation makes of float32 gates, and what they are multiplied by."""
    if KIND == "swigluoai":
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
        active = gate * tl.sigmoid(1.702 * gate)
    elif KIND == "silu":
        active = gate * tl.sigmoid(gate)
    elif KIND == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        tl.static_assert(KIND == "gelu_tanh")
        # (1 + tanh(x)) / 2 is sigmoid(2x).
        active = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return active, up


@triton.jit
def _gated(
    gate_up,
    out,
    features,
    row_stride,
    KIND: tl.constexpr,
    ALTERNATING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    gate_up += row * row_stride
    if ALTERNATING:
        gate_at, up_at = 2 * column, 2 * column + 1
    else:
        gate_at, up_at = column, features + column
    stored = tl.load(gate_up + gate_at, mask=inside, other=0.0)
    gate = stored.to(tl.float32)
    up = tl.load(gate_up + up_at, mask=inside, other=0.0).to(tl.float32)
    active, up = activated(gate, up, KIND)
    if KIND != "swigluoai":
        active = active.to(stored.dtype).to(tl.float32)
    tl.store(out + row * features + column, (active * up).to(stored.dtype), mask=inside)


def gated(gate_up: Tensor, kind: str, *, alternating: bool = False) -> Tensor:
    """`activation(gate) * up`: [tokens, 2 * features] -> [tokens, features].

    Args:
        gate_up: all gates, then all ups.
        kind: `silu`, `gelu`, `gelu_tanh`, or `swigluoai`, which is gpt-oss's (it adds 1 to ups).
        alternating: every gate is followed by its up instead.
    """
    tokens, features = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(tokens, features, dtype=gate_up.dtype, device=gate_up.device)
    if not out.numel():
        return out
    assert gate_up.stride(1) == 1
    _gated[(tokens, triton.cdiv(features, _BLOCK))](
        gate_up,
        out,
        features,
        gate_up.stride(0),
        KIND=kind,
        ALTERNATING=alternating,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out
