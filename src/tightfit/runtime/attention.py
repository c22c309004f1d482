"""Attention over the paged KV cache: one interface, and the implementation that runs everywhere.

An `AttentionBackend` looks at a batch once per step; what it returns is called by every layer. The
implementation here gathers a sequence's blocks and calls PyTorch's `scaled_dot_product_attention`,
whose CPU kernel is a flash kernel: it stores no scores. Query heads that share a KV head are not
copied: they are a dimension over which keys and values are broadcast.

Memory is bounded by constants that the planner's formulas share (`builtin_memory`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.model.blocks.attention import Attention
from tightfit.planner.engines.builtin_memory import BIAS_ELEMENTS, GATHER_TOKENS, SCORE_ELEMENTS
from tightfit.runtime.batch import Batch, Span
from tightfit.runtime.kv_cache import KVCache
from tightfit.units import cdiv


class Attend(Protocol):
    """One step's attention, for any layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, and attend to the whole sequence.

        Args:
            layer: index of the layer.
            q: [tokens, heads, head_dim].
            k: [tokens, kv_heads, head_dim].
            v: like `k`.

        Returns:
            [tokens, heads * head_dim].
        """
        ...


class AttentionBackend(Protocol):
    """Prepares what all layers of one step share."""

    def step(self, batch: Batch) -> Attend:
        """Look at the batch once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decodes:
    """Rows with one new token each, that attend together: `table` [rows, blocks], padded.

    `bias` [rows, 1, 1, blocks * block_size] is 0 where a row may look, and -inf elsewhere.
    """

    rows: slice
    table: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prefill:
    """Several new tokens of one sequence: positions `start` on, keys from `first_key` on."""

    rows: slice
    start: int
    first_key: int
    table: Tensor


class SdpaAttention:
    """`AttentionBackend` by gathering blocks; for every device."""

    def __init__(self, layers: tuple[Attention, ...], cache: KVCache, dtype: torch.dtype) -> None:
        self._layers = layers
        self._cache = cache
        self._dtype = dtype
        self._windows = {attention.window for attention in layers}

    def step(self, batch: Batch) -> Attend:
        """Group the decodes and find the blocks that each kind of window needs."""
        block_size = self._cache.block_size
        device = batch.slots.device
        decodes = {
            window: tuple(_group(batch.spans, window, block_size, self._dtype, device))
            for window in self._windows
        }
        prefills = {
            window: tuple(_prefills(batch.spans, window, block_size, device))
            for window in self._windows
        }

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attention = self._layers[layer]
            keys, values = self._cache.layers[layer]
            keys.flatten(0, 1).index_copy_(0, batch.slots, k)
            values.flatten(0, 1).index_copy_(0, batch.slots, v)
            out = torch.empty(q.shape, dtype=q.dtype, device=device)
            q, grouped = (x.unflatten(1, (k.shape[1], -1)) for x in (q, out))
            for decode in decodes[attention.window]:
                shape = decode.table.shape
                past_k, past_v = (
                    x.index_select(0, decode.table.flatten()).unflatten(0, shape).flatten(1, 2)
                    for x in (keys, values)
                )
                grouped[decode.rows] = _attend_together(
                    q[decode.rows], past_k, past_v, decode, attention
                )
            for prefill in prefills[attention.window]:
                past_k, past_v = (
                    x.index_select(0, prefill.table).flatten(0, 1) for x in (keys, values)
                )
                attend_alone(
                    grouped[prefill.rows],
                    q[prefill.rows],
                    past_k,
                    past_v,
                    attention,
                    start=prefill.start,
                    first_key=prefill.first_key,
                )
            return out.flatten(1)

        return attend


def _attend_together(
    q: Tensor, k: Tensor, v: Tensor, decode: _Decodes, attention: Attention
) -> Tensor:
    """One query per sequence: q [rows, kv_heads, group, head_dim], k [rows, keys, kv_heads, ...].

    The heads of a group take the place of the queries of a sequence, so that they share the keys.
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if attention.softcap is not None:
        return _capped(q, k, v, decode.bias, attention)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=decode.bias, scale=attention.scale)


def attend_alone(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Attention,
    *,
    start: int = 0,
    first_key: int = 0,
) -> None:
    """Many queries of one sequence: out and q [tokens, kv_heads, group, ...], k [keys, kv_heads].

    Without history and window the kernel masks by itself; otherwise chunks of queries bound the
    size of the mask. The queries are at positions `start` on, and the keys at `first_key` on.
    """
    tokens, kv_heads, group, _ = q.shape
    window = attention.window
    stop = start + tokens
    q, out = q.permute(1, 2, 0, 3), out.permute(1, 2, 0, 3)
    k, v = (x[: stop - first_key].transpose(0, 1)[:, None] for x in (k, v))
    if start == 0 and attention.softcap is None and (window is None or window >= stop):
        k, v = (x.expand(-1, group, -1, -1) for x in (k, v))
        out.copy_(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scale))
        return
    seen = stop - first_key
    if attention.softcap is None:
        step = max(1, BIAS_ELEMENTS // seen)
    else:
        step = max(1, SCORE_ELEMENTS // (seen * kv_heads * group))
    for i in range(0, tokens, step):
        queries = torch.arange(start + i, min(start + i + step, stop), device=q.device)
        first = first_key
        if window is not None:
            first = max(first, start + i - window + 1)
        here = slice(first - first_key, start + i + len(queries) - first_key)
        positions = torch.arange(first, start + i + len(queries), device=q.device)
        bias = _bias(queries[:, None], positions, window, q.dtype)
        some, ks, vs = q[:, :, i : i + step], k[:, :, here], v[:, :, here]
        if attention.softcap is not None:
            result = _capped(some, ks, vs, bias, attention)
        else:
            result = F.scaled_dot_product_attention(
                some,
                ks.expand(-1, group, -1, -1),
                vs.expand(-1, group, -1, -1),
                attn_mask=bias,
                scale=attention.scale,
            )
        out[:, :, i : i + step] = result


def _capped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, attention: Attention) -> Tensor:
    """Attention with soft-capped scores, which no fused kernel offers; softmax in float32."""
    cap = attention.softcap
    assert cap is not None
    scores = torch.matmul(q, k.transpose(-1, -2)).float()
    scores.mul_(attention.scale / cap).tanh_().mul_(cap).add_(bias)
    return torch.matmul(scores.softmax(dim=-1).to(v.dtype), v)


def _bias(queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a query may see a key, and -inf elsewhere; the arguments are positions."""
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return bias.masked_fill_(hidden, float("-inf"))


def _first_block(start: int, window: int | None, block_size: int) -> int:
    """The first block that a query at `start` can see."""
    return 0 if window is None else max(0, start - window + 1) // block_size


def _group(
    spans: tuple[Span, ...],
    window: int | None,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[_Decodes]:
    """Group the spans of one token so that a group gathers at most GATHER_TOKENS, or one sequence.

    Spans are sorted by length, so a group is padded little.
    """
    tables = []
    for span in spans:
        if span.count > 1:
            break
        first = _first_block(span.start, window, block_size)
        tables.append((first, span.blocks[first : cdiv(span.stop, block_size)]))
    end = len(tables)
    while end:
        widest = max(len(blocks) for _, blocks in tables[:end])
        start = max(0, end - max(1, GATHER_TOKENS // (widest * block_size)))
        padded = [[*blocks, *[0] * (widest - len(blocks))] for _, blocks in tables[start:end]]
        first_keys = torch.tensor([first for first, _ in tables[start:end]], device=device)
        queries = torch.tensor([span.start for span in spans[start:end]], device=device)
        keys = torch.arange(widest * block_size, device=device)
        keys = keys + first_keys[:, None] * block_size
        yield _Decodes(
            rows=slice(start, end),
            table=torch.tensor(padded, device=device),
            bias=_bias(queries[:, None], keys, window, dtype)[:, None, None],
        )
        end = start


def _prefills(
    spans: tuple[Span, ...], window: int | None, block_size: int, device: torch.device
) -> Iterator[_Prefill]:
    row = 0
    for span in spans:
        if span.count > 1:
            first = _first_block(span.start, window, block_size)
            blocks = span.blocks[first : cdiv(span.stop, block_size)]
            yield _Prefill(
                rows=slice(row, row + span.count),
                start=span.start,
                first_key=first * block_size,
                table=torch.tensor(blocks, device=device),
            )
        row += span.count
