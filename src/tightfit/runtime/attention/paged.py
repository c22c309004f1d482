"""Attention on GPUs: kernels that find keys and values in the paged KV cache by themselves.

A step has single tokens first and longer pieces of prompts after them, and each kind goes to the
kernel that is fastest at it. Whatever a kernel has to know of a step is made before the first
layer, without waiting for the device; for single tokens it depends on shapes alone, so that a CUDA
graph can record it. Triton's kernels do everything; `attention_probe` finds out whether others that
are installed can do better.
"""

from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from tightfit.planner.engines.builtin_paged import workspace_elements
from tightfit.runtime.attention.base import Attend, AttentionLayer
from tightfit.runtime.attention.kv_cache import KVCache
from tightfit.runtime.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """Some sequences of a step, all with one new token or all with several.

    `query_starts` count from 0 to `tokens`. It, `lengths` and `block_table` are as in `Paging`.
    """

    query_starts: Tensor
    lengths: Tensor
    block_table: Tensor
    tokens: int
    max_query: int
    """New tokens of a sequence at most."""
    max_length: int
    """No sequence is longer."""
    fresh: bool
    """Nothing of these sequences was in the cache before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class New:
    """What the tokens of some rows add to the cache.

    Keys and values are [tokens, kv_heads, ...], slots as in `Batch`; latents have no values.
    """

    k: Tensor
    v: Tensor | None
    slots: Tensor

    def __getitem__(self, tokens: slice) -> "New":
        v = None if self.v is None else self.v[tokens]
        return New(k=self.k[tokens], v=v, slots=self.slots[tokens])


class Kernel(Protocol):
    """Attention over the paged cache."""

    name: str
    stores: bool
    """Whether it puts single tokens into the cache itself; all others are there before."""

    def __call__(
        self,
        layer: AttentionLayer,
        out: Tensor,
        q: Tensor,
        new: New | None,
        cache: tuple[Tensor, Tensor | None],
        rows: Queries,
    ) -> None:
        """Write `out`, [tokens, heads, value_dim].

        Args:
            layer: how to attend.
            out: contiguous.
            q: [tokens, heads, head_dim], perhaps a view.
            new: of the same tokens; None is for single tokens that are in the cache before.
            cache: keys and values; without values they are the beginning of the keys.
            rows: of which `out` and `q` have a row for each token.
        """
        ...


class TritonKernel:
    """The kernels of this package."""

    name = "triton"
    stores = True

    def __init__(self, workspace: Tensor) -> None:
        self._workspace = workspace

    def __call__(
        self,
        layer: AttentionLayer,
        out: Tensor,
        q: Tensor,
        new: New | None,
        cache: tuple[Tensor, Tensor | None],
        rows: Queries,
    ) -> None:
        """See `Kernel`."""
        from tightfit.runtime.kernels import paged

        how: dict[str, Any] = {
            "scale": layer.scale,
            "window": layer.window,
            "softcap": layer.softcap,
            "sinks": layer.sinks,
            "k_scale": layer.k_scale,
            "v_scale": layer.v_scale,
        }
        if rows.max_query == 1:
            paged.decode(
                out,
                q,
                *cache,
                rows.lengths,
                rows.block_table,
                self._workspace,
                max_length=rows.max_length,
                **how,
                new=None if new is None else (new.k, new.v, new.slots),
            )
        else:
            paged.prefill(
                out,
                q,
                *cache,
                rows.query_starts,
                rows.lengths,
                rows.block_table,
                **how,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What runs a kind of layer. `fresh` is for prompts without history, `prefill` for any."""

    decode: Kernel
    prefill: Kernel
    fresh: Kernel


class PagedAttention:
    """`AttentionBackend` for GPUs.

    Args:
        layers: of the rank.
        cache: theirs.
        dtype: of computation.
        max_num_seqs: sequences that a step may have.
        max_model_len: tokens that a sequence may have.
        backend: `auto`, or the name of a kernel that must do what it can.

    Raises:
        UsageError: there is no backend of that name, or it can do nothing here.
    """

    def __init__(
        self,
        layers: tuple[AttentionLayer, ...],
        cache: KVCache,
        dtype: torch.dtype,
        *,
        max_num_seqs: int,
        max_model_len: int,
        backend: str = "auto",
    ) -> None:
        # These know this module's kernels.
        from tightfit.runtime.attention.probe import CacheLayout, Probed, probe

        self.layers = layers
        self.cache = cache
        device = cache.layers[0][0].device
        elements = workspace_of(layers, max_num_seqs, max_model_len)
        self._workspace = torch.empty(elements, dtype=torch.float32, device=device)
        triton = TritonKernel(self._workspace)
        probed: dict[object, Probed] = {}
        self.kernels: list[Kernels] = []
        for layer, (keys, values) in zip(layers, cache.layers, strict=True):
            kind = CacheLayout(
                dtype=keys.dtype,
                block_size=cache.block_size,
                latent=keys.data_ptr() == values.data_ptr(),
                device=device,
            )
            key = (kind, layer.sinks is None, _numbers(layer))
            if key not in probed:
                probed[key] = probe(layer, kind, dtype, triton, backend)
            self.kernels.append(probed[key].kernels)
        lines = (line for found in probed.values() for line in found.report)
        self.report = tuple(dict.fromkeys(lines))

    @property
    def nbytes(self) -> int:
        """Bytes of the workspace."""
        return self._workspace.nbytes

    def step(self, batch: Batch) -> Attend:
        """Divide the batch; at most one small kernel runs."""
        assert batch.paging is not None
        paging, n = batch.paging, batch.num_decodes
        tokens, sequences = len(batch.slots), len(paging.lengths)
        decodes = prefills = None
        if n:
            decodes = Queries(
                query_starts=paging.query_starts[: n + 1],
                lengths=paging.lengths[:n],
                block_table=paging.block_table[:n],
                tokens=n,
                max_query=1,
                max_length=paging.max_length,
                fresh=False,
            )
        if sequences > n:
            spans = batch.spans[n:]
            prefills = Queries(
                query_starts=paging.query_starts[n:] - n,
                lengths=paging.lengths[n:],
                block_table=paging.block_table[n:],
                tokens=tokens - n,
                max_query=max(span.count for span in spans),
                max_length=paging.max_length,
                fresh=all(span.start == 0 for span in spans),
            )
        return _Step(self, batch.slots, decodes, prefills)


class _Step:
    """`Attend` of one batch."""

    def __init__(
        self,
        backend: PagedAttention,
        slots: Tensor,
        decodes: Queries | None,
        prefills: Queries | None,
    ) -> None:
        self._backend = backend
        self._slots = slots
        self._decodes = decodes
        self._prefills = prefills

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new = New(k=k, v=v, slots=self._slots)
        return self._attend(layer, q, new, self._backend.cache.layers[layer]).flatten(1)

    def latent(self, layer: int, q: Tensor, latent: Tensor) -> Tensor:
        keys, _ = self._backend.cache.layers[layer]
        return self._attend(
            layer, q, New(k=latent[:, None], v=None, slots=self._slots), (keys, None)
        )

    def _attend(
        self, index: int, q: Tensor, new: New, cache: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        from tightfit.runtime.kernels.kv_store import store

        layer, kernels = self._backend.layers[index], self._backend.kernels[index]
        out = q.new_empty(len(q), layer.heads, layer.value_dim)
        n = self._decodes.tokens if self._decodes is not None else 0
        others = new[n if kernels.decode.stores else 0 :]
        store(others.k, others.v, others.slots, *cache, layer.k_scale, layer.v_scale)
        if self._decodes is not None:
            kernels.decode(layer, out[:n], q[:n], new[:n], cache, self._decodes)
        if self._prefills is not None:
            kernel = kernels.fresh if self._prefills.fresh else kernels.prefill
            kernel(layer, out[n:], q[n:], new[n:], cache, self._prefills)
        return out


def _numbers(layer: AttentionLayer) -> tuple[object, ...]:
    return tuple(getattr(layer, f.name) for f in fields(layer) if f.name != "sinks")


def workspace_of(layers: tuple[AttentionLayer, ...], max_num_seqs: int, max_model_len: int) -> int:
    """Float32 elements of the workspace that all layers share."""
    shapes = {(layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim) for layer in layers}
    return max(workspace_elements(max_num_seqs, *shape, max_model_len) for shape in shapes)
