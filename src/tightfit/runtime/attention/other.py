"""Attention kernels that others build: FlashAttention's, as vLLM or its own package has them, and
PyTorch's.

Each raises what it likes if it cannot do something; `attention_probe` takes that for an answer.
"""

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tightfit.runtime.attention.base import AttentionLayer
from tightfit.runtime.attention.paged import Kernel, New, Queries


class VllmFlash:
    """vLLM's build of FlashAttention, which takes pages of 16 tokens, and sinks in version 3."""

    stores = False

    def __init__(self, function: Callable[..., Any], version: int) -> None:
        self.name = f"flash-attn {version} (vLLM's)"
        self._function = function
        self._version = version

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
        self._function(
            q,
            *cache,
            max_seqlen_q=rows.max_query,
            cu_seqlens_q=rows.query_starts,
            max_seqlen_k=rows.max_length,
            seqused_k=rows.lengths,
            softmax_scale=layer.scale,
            causal=True,
            window_size=_window(layer),
            softcap=layer.softcap or 0.0,
            block_table=rows.block_table,
            out=out,
            fa_version=self._version,
            s_aux=None if layer.sinks is None else layer.sinks.to(q.dtype),
        )


class FlashAttention3:
    """The package `flash_attn_interface`."""

    name = "flash-attn 3"
    stores = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

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
        if layer.sinks is not None:
            raise NotImplementedError("it has no sinks")
        result = self._function(
            q,
            *cache,
            cache_seqlens=rows.lengths,
            page_table=rows.block_table,
            cu_seqlens_q=rows.query_starts,
            max_seqlen_q=rows.max_query,
            softmax_scale=layer.scale,
            causal=True,
            window_size=tuple(_window(layer)),
            softcap=layer.softcap or 0.0,
        )
        out.copy_(result)


class TorchVarlen:
    """PyTorch's `varlen_attn`: whole prompts, and in later versions the paged cache."""

    name = "torch varlen_attn"
    stores = False

    def __init__(self, function: Callable[..., Any], into: Callable[..., Any] | None) -> None:
        self._function = function
        self._into = into
        self._takes = inspect.signature(function).parameters

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
        if layer.sinks is not None or layer.softcap is not None:
            raise NotImplementedError("it has neither sinks nor softcap")
        options: dict[str, Any] = {"scale": layer.scale}
        if "window_size" in self._takes:
            options["window_size"] = (_window(layer)[0], 0)
        elif layer.window is None:
            options["is_causal"] = True
        else:
            raise NotImplementedError("this version has no sliding window")
        if "enable_gqa" in self._takes:
            options["enable_gqa"] = layer.heads != layer.kv_heads
        if rows.fresh and new is not None:
            starts, longest, keys_and_values = rows.query_starts, rows.max_query, (new.k, new.v)
        elif "block_table" in self._takes:
            starts, longest, keys_and_values = None, rows.max_length, cache
            options |= {"seqused_k": rows.lengths, "block_table": rows.block_table}
        else:
            raise NotImplementedError("this version has no block_table")
        arguments = (q, *keys_and_values, rows.query_starts, starts, rows.max_query, longest)
        if self._into is not None:
            self._into(out, *arguments, **options)
        else:
            out.copy_(self._function(*arguments, **options))


def flash_attention(device: torch.device) -> Iterator[Kernel]:
    """What is installed of it, the newest first.

    Raises:
        ImportError: nothing.
    """
    newest = torch.cuda.get_device_capability(device)[0] == 9
    reasons = []
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except Exception as e:  # whatever an installation raises that does not fit
        reasons.append(f"vllm: {e}")
    else:
        for version in (3, 2) if newest else (2,):
            yield VllmFlash(flash_attn_varlen_func, version)
    try:
        interface = import_module("flash_attn_interface")
    except Exception as e:
        reasons.append(f"flash_attn_interface: {e}")
    else:
        yield FlashAttention3(interface.flash_attn_with_kvcache)
    if len(reasons) == 2:
        raise ImportError(", ".join(reasons))


def torch_attention(device: torch.device) -> Iterator[Kernel]:
    """PyTorch's own.

    Raises:
        ImportError: this version has none.
    """
    from torch.nn.attention import varlen

    yield TorchVarlen(varlen.varlen_attn, getattr(varlen, "varlen_attn_out", None))


FAMILIES: dict[str, Callable[[torch.device], Iterator[Kernel]]] = {
    "flash-attn": flash_attention,
    "torch": torch_attention,
}
"""By the name of the backend."""


def _window(layer: AttentionLayer) -> list[int]:
    """Keys to the left and right of a query; -1 is all, and `causal` takes those to the right."""
    return [-1, -1] if layer.window is None else [layer.window - 1, 0]
