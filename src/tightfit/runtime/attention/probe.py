"""Which kernel attends: others than Triton's are tried on a small problem before they are trusted.

A kernel of somebody else may lack what a layer needs, or be built for another GPU, and its
signature changes between versions. So it is not asked what it can do: it runs beside explicit
attention in float32, and an exception or a wrong result is the reason why it is not taken.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from tightfit.errors import UsageError
from tightfit.runtime.attention.base import AttentionLayer
from tightfit.runtime.attention.other import FAMILIES
from tightfit.runtime.attention.paged import Kernel, Kernels, New, Queries
from tightfit.units import cdiv

BACKENDS = ("auto", "triton", *FAMILIES)
"""What may be asked for."""

_FASTEST_FIRST = {
    "decode": ("triton", "flash-attn", "torch"),
    "prefill": ("flash-attn", "triton", "torch"),
    "fresh": ("flash-attn", "triton", "torch"),
}
"""By what there is to do: single tokens, prompts with history, prompts without."""

_TRIALS = {
    "decode": ((3, 150, 0), (1, 1, 1)),
    "prefill": ((40, 150), (40, 37)),
    "fresh": ((40, 150), (40, 150)),
}
"""Lengths of sequences, and how many tokens of them are new; length 0 is a place in a graph."""

_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """What kernels must cope with: the layout of the KV cache, and where it is."""

    dtype: torch.dtype
    block_size: int
    latent: bool
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """The kernels for a kind of layer, and by backend why it is not taken for something."""

    kernels: Kernels
    refusals: Mapping[str, str]

    @property
    def report(self) -> tuple[str, ...]:
        """Lines to print."""
        chosen = self.kernels
        return (
            f"attention: decodes by {chosen.decode.name}, prompts by {chosen.fresh.name}, "
            f"prompts with history by {chosen.prefill.name}",
            *(f"attention: not {name}: {reason}" for name, reason in self.refusals.items()),
        )


def probe(
    layer: AttentionLayer, cache: CacheLayout, dtype: torch.dtype, triton: Kernel, backend: str
) -> Probed:
    """Choose for a kind of layer.

    Args:
        layer: an example.
        cache: what its keys and values are in.
        dtype: of computation.
        triton: what does everything.
        backend: `auto`, or the name of the one that must do what it can.

    Raises:
        UsageError: there is no such backend, or it can do nothing.
    """
    if backend not in BACKENDS:
        raise UsageError(
            f"there is no attention backend {backend!r}", hint=f"one of {', '.join(BACKENDS)}"
        )
    refusals: dict[str, str] = {}
    families: dict[str, list[Kernel]] = {"triton": [triton]}
    chosen: dict[str, Kernel] = {}
    for task, order in _FASTEST_FIRST.items():
        for family in order if backend == "auto" else (backend, "triton"):
            if family not in families:
                families[family] = list(_load(family, layer, cache, dtype, refusals))
            kernel = _first_right(families[family], task, layer, cache, dtype, refusals)
            if kernel is not None:
                chosen[task] = kernel
                break
    if backend not in ("auto", "triton") and set(chosen.values()) == {triton}:
        raise UsageError(
            f"the attention backend {backend!r} cannot run this model here: "
            f"{'; '.join(refusals.values())}",
            hint="`auto` takes what can",
        )
    return Probed(kernels=Kernels(**chosen), refusals=refusals)


def _load(
    family: str,
    layer: AttentionLayer,
    cache: CacheLayout,
    dtype: torch.dtype,
    refusals: dict[str, str],
) -> Iterator[Kernel]:
    if cache.latent:
        refusals[family] = "it does not know a latent cache"
    elif dtype == torch.float32 or cache.dtype != dtype:
        refusals[family] = f"it does not compute in {dtype} with a cache of {cache.dtype}"
    elif layer.head_dim != layer.value_dim:
        refusals[family] = "keys and values have different sizes"
    else:
        try:
            yield from FAMILIES[family](cache.device)
        except ImportError as e:
            refusals[family] = str(e)


def _first_right(
    kernels: list[Kernel],
    task: str,
    layer: AttentionLayer,
    cache: CacheLayout,
    dtype: torch.dtype,
    refusals: dict[str, str],
) -> Kernel | None:
    for kernel in kernels:
        if kernel.name == "triton":
            return kernel
        try:
            error = trial(kernel, task, layer, cache, dtype)
        except Exception as e:
            lines = str(e).strip().splitlines() or [type(e).__name__]
            refusals.setdefault(kernel.name, f"{task}: {lines[0]}")
            continue
        if error <= _TOLERANCE:
            return kernel
        refusals.setdefault(kernel.name, f"{task}: its results are wrong by {error:.3g}")
    return None


@torch.inference_mode()
def trial(
    kernel: Kernel, task: str, layer: AttentionLayer, cache: CacheLayout, dtype: torch.dtype
) -> float:
    """The largest error of a kernel in a small problem; waits for the device."""
    if layer.window is not None:
        layer = replace(layer, window=min(layer.window, 33))
    lengths, counts = _TRIALS[task]
    device, size = cache.device, cache.block_size
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    width = cdiv(max(lengths), size)
    blocks = len(lengths) * width
    table = torch.randperm(blocks, generator=generator).view(len(lengths), width).to(device)
    keys = random(blocks, size, layer.kv_heads, layer.head_dim)
    values = keys[..., : layer.value_dim] if cache.latent else random(*keys.shape)
    if cache.dtype != dtype:
        keys, values = (x.to(cache.dtype) for x in (keys, values))
    past = [
        tuple(x[table[i]].flatten(0, 1)[:length].to(dtype) for x in (keys, values))
        for i, length in enumerate(lengths)
    ]
    k, v = (torch.cat([pair[i] for pair in past]) for i in range(2))
    q = random(sum(counts), layer.heads + 1, layer.head_dim)[:, :-1]
    starts = [0, *accumulate(counts)]
    rows = Queries(
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=table.int(),
        tokens=len(q),
        max_query=max(counts),
        max_length=max(lengths),
        fresh=task == "fresh",
    )
    out = q.new_empty(len(q), layer.heads, layer.value_dim)
    pair = (keys, None if cache.latent else values)
    # The cache has all of them, so a slot is needed by none.
    new = None if task == "decode" else New(k=k, v=v, slots=table.new_full((len(k),), -1))
    kernel(layer, out, q, new, pair, rows)
    errors = [
        (out[here].float() - expected(layer, q[here], *past[i])).abs().max()
        for i, length in enumerate(lengths)
        if length
        for here in [slice(starts[i], starts[i + 1])]
    ]
    # A maximum would lose NaN.
    return float(torch.stack(errors).sum())


def expected(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Explicit attention of the last `len(q)` tokens of one sequence, in float32.

    q is [queries, heads, head_dim], k and v are [length, kv_heads, ...], before their scales; the
    result is [queries, heads, value_dim].
    """
    k, v = k.float() * layer.k_scale, v.float() * layer.v_scale
    q, k, v = (x.transpose(0, 1) for x in (q.float(), k, v))
    k, v = (x.repeat_interleave(layer.heads // layer.kv_heads, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    key = torch.arange(k.shape[1], device=q.device)
    query = key[-q.shape[1] :, None]
    hidden = key > query
    if layer.window is not None:
        hidden |= key <= query - layer.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if layer.sinks is not None:
        sinks = layer.sinks.float()[:, None, None].expand(*scores.shape[:2], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : len(key)]
    return (weights @ v).transpose(0, 1)
