"""Attention over the paged KV cache: what launches the kernels of `attention`."""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from tightfit.planner.engines.builtin_paged import MAX_SPLITS, num_splits
from tightfit.runtime.kernels.attention import attend, combine
from tightfit.runtime.kernels.kv_store import fp8_max
from tightfit.runtime.kernels.tiles import (
    H100_SHARED_BYTES,
    Tile,
    ceil_power_of_two,
    decode_tile,
    prefill_tile,
)

_LOG2_E = 1.4426950408889634


def decode(
    out: Tensor,
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None,
    lengths: Tensor,
    block_table: Tensor,
    workspace: Tensor,
    *,
    scale: float,
    max_length: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    new: tuple[Tensor, Tensor | None, Tensor] | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> None:
    """Attention of one new token of each sequence.

    Args:
        out: [sequences, heads, value_dim], contiguous; written.
        q: [sequences, heads, head_dim], perhaps a view; float32, bfloat16 or float16.
        key_cache: [blocks, block_size, kv_heads, head_dim], contiguous; q's dtype or e4m3fn.
        value_cache: as `key_cache` with value_dim; None takes the keys' first features.
        lengths: int32 [sequences], the new token included; 0 writes zeros.
        block_table: int32 [sequences, blocks].
        workspace: float32, of `workspace_elements` at least; overwritten.
        scale: what scores are multiplied by.
        max_length: no sequence becomes longer.
        window: tokens that a query sees, itself included; None sees all.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: [heads], a logit of each head that has no value.
        k_scale: what an e4m3fn cache's keys are multiplied by.
        v_scale: the same of its values.
        new: the tokens' keys, values and slots as `store` takes them, to be put into the cache
            first; None if they are there.
        tile: instead of the table's.
        splits: instead of those that `num_splits` chooses.
    """
    sequences, heads, head_dim = q.shape
    kv_heads, value_dim = key_cache.shape[2], out.shape[2]
    tile = tile or decode_tile(heads // kv_heads, head_dim, q.element_size())
    splits = splits or num_splits(sequences, heads, kv_heads, head_dim, max_length)
    partial = logs = workspace
    if splits > 1:
        rows = splits * sequences * heads
        partial, logs = workspace[: rows * value_dim], workspace[rows * value_dim :]
        assert len(logs) >= rows
    tiles = sequences * -(-heads // kv_heads // tile.rows)
    _launch(
        (tiles * kv_heads, splits),
        (out, partial, logs, q, key_cache, value_cache, lengths, lengths, block_table, sinks),
        new,
        tile,
        scale,
        window,
        softcap,
        k_scale,
        v_scale,
        decode=True,
    )
    if splits > 1:
        combine[(sequences, heads)](
            out,
            partial,
            logs,
            lengths,
            splits,
            sequences,
            HEADS=heads,
            VALUE_DIM=value_dim,
            VALUE=ceil_power_of_two(value_dim),
            WINDOW=window or 0,
            KEYS=tile.keys,
            MAX_SPLITS=MAX_SPLITS,
            CHUNK=32,
            num_warps=4 if value_dim <= 256 else 8,
        )


def prefill(
    out: Tensor,
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor | None,
    query_starts: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    tile: Tile | None = None,
) -> None:
    """Causal attention of the last tokens of each sequence, which are in the cache already.

    As `decode`, but sequence i has the queries `query_starts[i] : query_starts[i + 1]`, int32
    [sequences + 1] from 0 to the number of tokens, and `out` and `q` have a row for each.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = key_cache.shape[2]
    tile = tile or prefill_tile(head_dim, q.element_size(), _shared_bytes(q.device))
    tiles = tokens * (heads // kv_heads) // tile.rows + len(lengths)
    _launch(
        (tiles * kv_heads, 1),
        (out, out, out, q, key_cache, value_cache, query_starts, lengths, block_table, sinks),
        None,
        tile,
        scale,
        window,
        softcap,
        k_scale,
        v_scale,
        decode=False,
    )


@lru_cache
def _shared_bytes(device: torch.device) -> int:
    """What a GPU gives one program."""
    if device.type != "cuda":
        return H100_SHARED_BYTES
    utils = triton.runtime.driver.active.utils
    return int(utils.get_device_properties(device.index)["max_shared_mem"])


def _launch(
    grid: tuple[int, int],
    tensors: tuple[Tensor | None, ...],
    new: tuple[Tensor, Tensor | None, Tensor] | None,
    tile: Tile,
    scale: float,
    window: int | None,
    softcap: float | None,
    k_scale: float,
    v_scale: float,
    *,
    decode: bool,
) -> None:
    out, _, _, q, key_cache, value_cache, _, lengths, block_table, sinks = tensors
    assert out is not None
    assert q is not None
    assert key_cache is not None
    assert lengths is not None
    assert block_table is not None
    assert out.is_contiguous()
    assert q.stride(2) == 1
    assert key_cache.is_contiguous()
    assert value_cache is None or value_cache.is_contiguous()
    _, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = key_cache.shape
    value_dim = out.shape[2]
    low = ceil_power_of_two(head_dim + 1) // 2
    assert value_cache is not None or value_dim == low
    scale *= k_scale * _LOG2_E
    if softcap is not None:
        scale *= 2 / softcap
    new_k, new_v, slots = new or (None, None, None)
    assert new_k is None or new_k.stride(2) == 1
    assert new_v is None or new_v.stride(2) == 1
    attend[grid](
        *tensors,
        new_k,
        new_v,
        slots,
        scale,
        (softcap or 0.0) * _LOG2_E,
        v_scale,
        1 / k_scale,
        1 / v_scale,
        len(lengths),
        *q.stride()[:2],
        *((0, 0) if new_k is None else new_k.stride()[:2]),
        *((0, 0) if new_v is None else new_v.stride()[:2]),
        block_table.stride(0),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        LOW=low,
        REST=max(16, ceil_power_of_two(head_dim - low)) if head_dim > low else 0,
        KEY=ceil_power_of_two(head_dim),
        VALUE=ceil_power_of_two(value_dim),
        LATENT=value_cache is None,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        SINKS=sinks is not None,
        DECODE=decode,
        SPLIT=grid[1] > 1,
        STORE=new is not None,
        FP8_MAX=fp8_max(key_cache),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        ROWS=tile.rows,
        KEYS=tile.keys,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
