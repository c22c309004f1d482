"""The tensors of the KV cache: exactly `num_blocks` blocks, and not one more."""

import torch
from torch import Tensor

from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.cache import CacheKind, TokenCache
from tightfit.model.layout import Rank
from tightfit.model.parameters import stage_layers
from tightfit.model.spec import ModelSpec


def attending_layers(spec: ModelSpec, rank: Rank) -> tuple[int, ...]:
    """The layers of a rank that keep tokens, by which caches and backends count layers."""
    return tuple(
        i
        for i in stage_layers(spec, rank)
        if any(not mixer.is_recurrent for mixer in spec.layers[i].mixers)
    )


class KVCache:
    """Keys and values of the layers that attend: [num_blocks, block_size, kv_heads, head_dim] each.

    Of latent attention the keys have one head, the latent and the rotated key; the values are a
    view of their beginning, the latent. Every layer keeps all tokens, those with a sliding window
    too. All pages are written once, so that the memory is really there and not only promised.
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
        self._tensors: list[Tensor] = []
        for i in attending_layers(spec, rank):
            (mixer,) = spec.layers[i].mixers
            (cache,) = mixer.caches(rank)
            assert isinstance(cache, TokenCache)
            shape = num_blocks, block_size, cache.slots
            if isinstance(mixer, LatentAttention) and cache.kind is CacheKind.LATENT:
                rows = torch.empty(*shape, cache.key_size, dtype=dtype, device=device)
                pair = rows, rows[..., : mixer.kv_lora_rank]
            else:
                assert cache.key_size == cache.value_size
                rows = torch.empty(2, *shape, cache.key_size, dtype=dtype, device=device)
                pair = rows[0], rows[1]
            self._tensors.append(rows.fill_(0))
            self.layers.append(pair)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(rows.nbytes for rows in self._tensors)
