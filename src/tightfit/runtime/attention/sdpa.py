"""Attention that runs everywhere: it gathers a sequence's blocks, and lets PyTorch attend to them.

`scaled_dot_product_attention` has a flash kernel for CPUs, which stores no scores. Query heads that
share a KV head are not copied: they are a dimension over which keys and values are broadcast. What
that kernel cannot do, such as sinks, is computed with explicit scores.

Memory is bounded by constants that the planner's formulas share (`builtin_layers`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.planner.engines.builtin_layers import (
    BIAS_ELEMENTS,
    FP8_ELEMENTS,
    GATHER_TOKENS,
    SCORE_ELEMENTS,
)
from tightfit.runtime.attention.base import Attend, AttentionLayer
from tightfit.runtime.attention.kv_cache import KVCache
from tightfit.runtime.batch import Batch, Span
from tightfit.units import cdiv


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
    """`AttentionBackend` of CPUs, by gathering blocks."""

    report: tuple[str, ...] = ()

    def __init__(
        self, layers: tuple[AttentionLayer, ...], cache: KVCache, dtype: torch.dtype
    ) -> None:
        self.layers = layers
        self.cache = cache
        self.dtype = dtype
        self._windows = {attention.window for attention in layers}

    def step(self, batch: Batch) -> Attend:
        """Group the decodes and find the blocks that each kind of window needs."""
        block_size = self.cache.block_size
        device = batch.slots.device
        return _SdpaStep(
            self,
            batch.slots,
            torch.tensor(list(_begun(batch.spans, block_size)), dtype=torch.int64, device=device),
            {
                window: tuple(_group(batch.spans, window, block_size, self.dtype, device))
                for window in self._windows
            },
            {
                window: tuple(_prefills(batch.spans, window, block_size, device))
                for window in self._windows
            },
        )


class _SdpaStep:
    """`Attend` of one batch; groups are by window."""

    def __init__(
        self,
        backend: SdpaAttention,
        slots: Tensor,
        begun: Tensor,
        decodes: Mapping[int | None, Sequence[_Decodes]],
        prefills: Mapping[int | None, Sequence[_Prefill]],
    ) -> None:
        self._backend = backend
        self._slots = slots
        self._begun = begun
        self._decodes = decodes
        self._prefills = prefills

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._backend.cache.layers[layer]
        attention = self._backend.layers[layer]
        self._store(keys, k, attention.k_scale)
        self._store(values, v, attention.v_scale)
        return self._attend(layer, q).flatten(1)

    def latent(self, layer: int, q: Tensor, latent: Tensor) -> Tensor:
        keys, _ = self._backend.cache.layers[layer]
        self._store(keys, latent[:, None], self._backend.layers[layer].k_scale)
        return self._attend(layer, q)

    def _store(self, cached: Tensor, new: Tensor, scale: float) -> None:
        if len(self._begun):
            cached.view(torch.uint8).index_fill_(0, self._begun, 0)
        _store(cached, self._slots, new, scale)

    def _attend(self, layer: int, q: Tensor) -> Tensor:
        attention = self._backend.layers[layer]
        out = q.new_empty(len(q), attention.heads, attention.value_dim)
        q, grouped = (x.unflatten(1, (attention.kv_heads, -1)) for x in (q, out))
        for decode in self._decodes[attention.window]:
            shape = decode.table.shape
            k, v = (
                x.unflatten(0, shape).flatten(1, 2)
                for x in self._gather(layer, decode.table.flatten())
            )
            grouped[decode.rows] = _attend_together(q[decode.rows], k, v, decode, attention)
            # Or they would be there beside those of the next group.
            del k, v
        for prefill in self._prefills[attention.window]:
            k, v = (x.flatten(0, 1) for x in self._gather(layer, prefill.table))
            attend_alone(
                grouped[prefill.rows],
                q[prefill.rows],
                k,
                v,
                attention,
                start=prefill.start,
                first_key=prefill.first_key,
            )
            del k, v
        return out

    def _gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks, [blocks, block_size, kv_heads, ...]."""
        keys, values = self._backend.cache.layers[layer]
        attention, dtype = self._backend.layers[layer], self._backend.dtype
        k = _gather(keys, blocks, attention.k_scale, dtype)
        if values.data_ptr() == keys.data_ptr():
            return k, k[..., : values.shape[-1]]
        return k, _gather(values, blocks, attention.v_scale, dtype)


def _store(cached: Tensor, slots: Tensor, new: Tensor, scale: float) -> None:
    """Put keys or values [tokens, kv_heads, ...] into a cache, as `kernels.kv_store` does."""
    rows = cached.flatten(0, 1)
    if cached.dtype != torch.float8_e4m3fn:
        rows.index_copy_(0, slots, new)
        return
    largest = torch.finfo(cached.dtype).max
    step = max(1, FP8_ELEMENTS // rows[0].numel())
    for some, places in zip(new.split(step), slots.split(step), strict=True):
        scaled = some.to(torch.float32, copy=True).mul_(1 / scale).clamp_(-largest, largest)
        # On CPUs PyTorch copies such numbers by index only as bytes.
        codes = scaled.to(cached.dtype).view(torch.uint8)
        rows.view(torch.uint8).index_copy_(0, places, codes)


def _gather(cached: Tensor, blocks: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Blocks of a cache in the dtype of computation."""
    if cached.dtype != torch.float8_e4m3fn:
        return cached.index_select(0, blocks)
    found = torch.empty(len(blocks), *cached.shape[1:], dtype=dtype, device=cached.device)
    step = max(1, FP8_ELEMENTS // cached[0].numel())
    for some, there in zip(found.split(step), blocks.split(step), strict=True):
        some.copy_(cached.index_select(0, there))
    return found.mul_(scale)


def _attend_together(
    q: Tensor, k: Tensor, v: Tensor, decode: _Decodes, attention: AttentionLayer
) -> Tensor:
    """One query per sequence: q [rows, kv_heads, group, head_dim], k [rows, keys, kv_heads, ...].

    The heads of a group take the place of the queries of a sequence, so that they share the keys.
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if attention.explicit:
        scores = torch.matmul(q, k.transpose(-1, -2)).unsqueeze(-2)
        shares = _probabilities(scores, decode.bias.unsqueeze(-2), attention).to(v.dtype)
        return torch.matmul(shares.squeeze(-2), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=decode.bias, scale=attention.scale)


def attend_alone(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: AttentionLayer,
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
    if start == 0 and not attention.explicit and (window is None or window >= stop):
        k, v = (x.expand(-1, group, -1, -1) for x in (k, v))
        out.copy_(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scale))
        return
    seen = stop - first_key
    step = max(1, BIAS_ELEMENTS // seen)
    if attention.explicit:
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
        if attention.explicit:
            result = _explicit(some, ks, vs, bias, attention)
        else:
            result = F.scaled_dot_product_attention(
                some,
                ks.expand(-1, group, -1, -1),
                vs.expand(-1, group, -1, -1),
                attn_mask=bias,
                scale=attention.scale,
            )
        out[:, :, i : i + step] = result


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, attention: AttentionLayer) -> Tensor:
    """q [kv_heads, group, queries, ...] and k [kv_heads, 1, keys, ...] -> like q.

    Heads of a group are more queries to the same keys, which would else be copied for each.
    """
    shape = q.shape[1:3]
    scores = torch.matmul(q.flatten(1, 2), k[:, 0].transpose(-1, -2)).unflatten(1, shape)
    shares = _probabilities(scores, bias, attention).to(v.dtype)
    return torch.matmul(shares.flatten(1, 2), v[:, 0]).unflatten(1, shape)


def _probabilities(scores: Tensor, bias: Tensor, attention: AttentionLayer) -> Tensor:
    """Softmax, in float32, of products [..., kv_heads, group, queries, keys]."""
    scores = scores.float().mul_(attention.scale)
    if (cap := attention.softcap) is not None:
        scores.div_(cap).tanh_().mul_(cap)
    scores.add_(bias)
    if attention.sinks is None:
        return scores.softmax(dim=-1)
    sinks = attention.sinks.view(attention.kv_heads, -1, 1, 1)
    highest = scores.amax(dim=-1, keepdim=True).maximum(sinks)
    scores.sub_(highest).exp_()
    return scores.div_(scores.sum(dim=-1, keepdim=True).add_(sinks.sub(highest).exp_()))


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
        padded = [
            [*blocks, *[blocks[0]] * (widest - len(blocks))] for _, blocks in tables[start:end]
        ]
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


def _begun(spans: tuple[Span, ...], block_size: int) -> Iterator[int]:
    """Blocks that their sequences begin to fill in this step.

    They are gathered whole: what somebody else has left there counts nothing, unless it is not a
    number, since that is nothing's product with it too.
    """
    for span in spans:
        last = (span.stop - 1) // block_size
        if last * block_size >= span.start and span.stop % block_size:
            yield span.blocks[last]


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
