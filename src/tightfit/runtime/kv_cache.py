"""The tensors of the KV cache: exactly `num_blocks` blocks, and not one more."""

import torch
from torch import Tensor

from tightfit.model.blocks.attention import head_axes
from tightfit.model.layout import Rank
from tightfit.model.spec import ModelSpec


class KVCache:
    """Keys and values of every layer, each [num_blocks, block_size, kv_heads, head_dim].

    Every layer keeps all tokens, those with a sliding window too. All pages are written once, so
    that the memory is really there and not only promised.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rank: Rank,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.layers: list[tuple[Tensor, Tensor]] = []
        for layer in spec.layers:
            head_dim = layer.attention.head_dim
            heads = head_axes(layer.attention)[1].span(rank)[1] // head_dim
            pair = torch.empty(
                2, num_blocks, block_size, heads, head_dim, dtype=dtype, device=device
            )
            pair.fill_(0)
            self.layers.append((pair[0], pair[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)
