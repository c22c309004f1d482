"""What attention transformers' modelling code computes, found out by running one token through it.

The code says it in two ways, to the attention function (`scaling`, `sliding_window`, `softcap`) and
by the masks that it asks for, which are functions of two positions and can be questioned. A model
whose answers are not those of causal attention, full or with a window, is refused: whatever our
attention does not see would be left out silently.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.errors import UnsupportedModelError
from tightfit.model.spec import ModelSpec
from tightfit.runtime.attention.base import AttentionLayer

_FAR = 2**30
_FULL, _NOT_CAUSAL, _CHUNKS = 0, -1, -2
"""What a mask lets a query see, where it is not a number of tokens."""
_UNDERSTOOD = frozenset({"scaling", "sliding_window", "softcap", "s_aux"})
_HARMLESS = frozenset(
    {
        "dropout",
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    }
    | {"cache_position", "logits_to_keep", "is_causal", "output_router_logits"}
)
"""What says nothing about attention, or nothing new."""


class Probe:
    """Records what every layer asks for, and answers as attention to a single token does."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.found: dict[int, AttentionLayer] = {}

    def mask(self, *, mask_function: Callable[..., Any], device: Any, **_: Any) -> Tensor:
        """The window of a mask, as a tensor: layers hand it on to `attention`."""
        # Some masks are made and not used, so only their use is judged.
        return torch.full((1, 1, 1, 1), _seen(mask_function), dtype=torch.int64, device=device)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Queries [1, heads, 1, head_dim], keys and values likewise -> [1, 1, heads, head_dim]."""
        layer = layer_of(module)
        if not 0 <= layer < self.spec.num_layers or layer in self.found:
            raise self._refused(f"layer {layer} attends twice, or is not among its layers")
        if attention_mask is None:
            raise self._refused(f"layer {layer} attends without asking for a mask")
        found = self._described(layer, module, query, key, value, options)
        # Masks are what transformers' own attention goes by.
        self.found[layer] = replace(found, window=self._masked(layer, attention_mask))
        self._compare(layer)
        answer = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return answer.transpose(1, 2), None

    def attentions(self) -> tuple[AttentionLayer, ...]:
        """Of all layers in order.

        Raises:
            UnsupportedModelError: a layer has not called `attention`.
        """
        missing = [i for i in range(self.spec.num_layers) if i not in self.found]
        if missing:
            raise self._refused(
                f"{len(missing)} of {self.spec.num_layers} layers, such as layer {missing[0]}, do "
                "not attend through transformers' attention interface"
            )
        return tuple(self.found[i] for i in range(self.spec.num_layers))

    def _described(
        self,
        layer: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: Mapping[str, Any],
    ) -> AttentionLayer:
        odd = {
            name
            for name, given in options.items()
            if given is not None and name not in _UNDERSTOOD and name not in _HARMLESS
        }
        if odd:
            raise self._refused(f"attention of layer {layer} needs {', '.join(sorted(odd))}")
        if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise self._refused(f"attention of layer {layer} is not causal")
        if value.shape != key.shape:
            raise self._refused(
                f"keys of layer {layer} have {key.shape[-1]} features, and values {value.shape[-1]}"
            )
        scale, sinks = options.get("scaling"), options.get("s_aux")
        _, heads, _, head_dim = query.shape
        return AttentionLayer(
            heads=heads,
            kv_heads=key.shape[1],
            head_dim=head_dim,
            value_dim=head_dim,
            scale=head_dim**-0.5 if scale is None else float(scale),
            softcap=options.get("softcap"),
            sinks=None if sinks is None else sinks.float().flatten(),
        )

    def _masked(self, layer: int, mask: Tensor) -> int | None:
        """The window that a mask of `mask` says."""
        seen = _NOT_CAUSAL if mask.dtype.is_floating_point else int(mask.flatten()[0])
        if seen == _NOT_CAUSAL:
            raise self._refused(f"the mask of layer {layer} is not a causal one")
        if seen == _CHUNKS:
            raise self._refused(f"layer {layer} sees only chunks of tokens")
        return None if seen == _FULL else seen

    def _compare(self, layer: int) -> None:
        """Hold a layer against the description that the plan was made from."""
        found, planned = self.found[layer], self.spec.layers[layer].attention
        if (found.kv_heads, found.head_dim) != (planned.num_kv_heads, planned.head_dim):
            raise self._refused(
                f"layer {layer} keeps {found.kv_heads} KV heads of {found.head_dim} features, "
                f"and the plan has {planned.num_kv_heads} of {planned.head_dim}"
            )

    def _refused(self, why: str) -> UnsupportedModelError:
        return refused(self.spec, why)


def refused(spec: ModelSpec, why: str) -> UnsupportedModelError:
    """That a model cannot run this way."""
    return UnsupportedModelError(
        f"transformers' code for {spec.architecture} cannot run with this runtime's KV cache: "
        f"{why}",
        hint="serve it with vLLM; `tightfit plan` describes that",
    )


def layer_of(module: nn.Module) -> int:
    """The number that transformers gives to the attention of a layer; -1 if it gives none."""
    layer = getattr(module, "layer_idx", None)
    return layer if isinstance(layer, int) else -1


def _seen(mask_function: Callable[..., Any]) -> int:
    """Tokens that a mask lets a query see, itself included, or one of the codes above."""

    def sees(query: int, key: int) -> bool:
        zero, *pair = (torch.tensor(i) for i in (0, query, key))
        return bool(mask_function(zero, zero, *pair))

    if sees(5, 6) or not sees(5, 5):
        return _NOT_CAUSAL
    if sees(_FAR, 0):
        return _FULL
    low, high = 1, _FAR
    # What one query sees; others must see as much.
    while low < high:
        middle = (low + high + 1) // 2
        if sees(_FAR, _FAR - middle + 1):
            low = middle
        else:
            high = middle - 1
    queries = (3 * low, 3 * low + low // 2, _FAR - 1)
    alike = all(sees(q, q - low + 1) and not sees(q, q - low) for q in queries)
    return low if alike else _CHUNKS
