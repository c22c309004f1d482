"""Writing new keys and values to their places in the paged KV cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.runtime.kernels.tiles import ceil_power_of_two


@triton.jit
def store_row(
    source, place, inverse, FEATURES: tl.constexpr, BLOCK: tl.constexpr, FP8_MAX: tl.constexpr
):
    """Copy the features of a head."""
    i = tl.arange(0, BLOCK)
    x = tl.load(source + i, mask=i < FEATURES)
    tl.store(place + i, fitted(x, inverse, place.dtype.element_ty, FP8_MAX), mask=i < FEATURES)


@triton.jit
def fitted(x, inverse, dtype: tl.constexpr, FP8_MAX: tl.constexpr):
    """As a cache of `dtype` holds it; one of fp8 is scaled and saturates at `FP8_MAX` > 0."""
    if FP8_MAX > 0:
        x = tl.minimum(tl.maximum(x.to(tl.float32) * inverse, -FP8_MAX), FP8_MAX)
    return x.to(dtype)


@triton.jit(do_not_specialize=["slots"])
def _store(
    k,
    v,
    slots,
    key_cache,
    value_cache,
    k_inverse,
    v_inverse,
    k_token,
    k_head,
    v_token,
    v_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FP8_MAX: tl.constexpr,
    K_ELEMENTS: tl.constexpr,
    V_ELEMENTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    i = tl.arange(0, K_ELEMENTS)
    inside = i < KV_HEADS * HEAD_DIM
    x = tl.load(k + token * k_token + i // HEAD_DIM * k_head + i % HEAD_DIM, mask=inside)
    place = key_cache + slot * (KV_HEADS * HEAD_DIM) + i
    tl.store(place, fitted(x, k_inverse, key_cache.dtype.element_ty, FP8_MAX), mask=inside)
    if VALUE_DIM > 0:
        i = tl.arange(0, V_ELEMENTS)
        inside = i < KV_HEADS * VALUE_DIM
        x = tl.load(v + token * v_token + i // VALUE_DIM * v_head + i % VALUE_DIM, mask=inside)
        place = value_cache + slot * (KV_HEADS * VALUE_DIM) + i
        tl.store(place, fitted(x, v_inverse, value_cache.dtype.element_ty, FP8_MAX), mask=inside)


def store(
    k: Tensor,
    v: Tensor | None,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write keys and values [tokens, kv_heads, head_dim] to their places in the cache.

    They may be views of a wider tensor, their features next to each other; a latent cache has no
    values. The caches are contiguous, [blocks, block_size, kv_heads, head_dim]; `slots` are int64
    [tokens], and -1 is no place. A cache of float8_e4m3fn gets numbers divided by the scale, and
    bounded by what it can hold.
    """
    tokens, kv_heads, head_dim = k.shape
    if not tokens:
        return
    assert k.stride(2) == 1
    assert key_cache.is_contiguous()
    assert v is None or (value_cache is not None and v.stride(2) == 1)
    assert value_cache is None or value_cache.is_contiguous()
    value_dim = 0 if v is None else v.shape[2]
    _store[(tokens,)](
        k,
        v,
        slots,
        key_cache,
        value_cache,
        1 / k_scale,
        1 / v_scale,
        k.stride(0),
        k.stride(1),
        0 if v is None else v.stride(0),
        0 if v is None else v.stride(1),
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        FP8_MAX=fp8_max(key_cache),
        K_ELEMENTS=ceil_power_of_two(kv_heads * head_dim),
        V_ELEMENTS=ceil_power_of_two(max(1, kv_heads * value_dim)),
    )


def fp8_max(cache: Tensor) -> float:
    """Where a cache saturates; 0 if it need not be told."""
    return 448.0 if cache.dtype == torch.float8_e4m3fn else 0.0
