"""Latent attention (MLA): what is cached of a token is one small vector that all heads share.

Keys and values are projections of that latent. Instead of them the queries are projected, to the
latent's space, and the results, from there to values: latents are never expanded (DeepSeek V2,
arXiv 2405.04434, section 2.1.2). MiniCPM3 is expanded to whole heads, as vLLM does.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.layout import Rank
from tightfit.model.spec import ModelSpec
from tightfit.runtime.attention.base import Attend
from tightfit.runtime.layers import Linear, RowParallelLinear, Weights
from tightfit.runtime.models.norms import make_norm
from tightfit.runtime.ranks.world import World
from tightfit.runtime.rope import Rotation, rotate_


class LatentSelfAttention:
    """Small projections and their norms, rope, attention, output projection."""

    def __init__(
        self,
        spec: ModelSpec,
        attention: LatentAttention,
        weights: Weights,
        name: str,
        rank: Rank,
        world: World,
    ) -> None:
        self.heads = attention.heads(1).span(rank)[1]
        self.absorbed = attention.absorbed
        self.query_sizes = [attention.qk_nope_head_dim, attention.qk_rope_head_dim]
        self.latent_sizes = [attention.kv_lora_rank, attention.qk_rope_head_dim]
        self.value_dim = attention.v_head_dim
        self.q_rank = attention.q_lora_rank
        self.down = [Linear(weights, f"{name}.{part}") for part in _down(attention)]
        self.q_proj = Linear(weights, f"{name}.{'q_b_proj' if self.q_rank else 'q_proj'}")
        self.q_norm = None
        if self.q_rank is not None:
            self.q_norm = make_norm(spec, weights.tensors, f"{name}.q_a_layernorm")
        self.kv_norm = make_norm(spec, weights.tensors, f"{name}.kv_a_layernorm")
        if self.absorbed:
            self.to_keys, self.to_values = self._halves(weights, f"{name}.kv_b_proj.weight")
        else:
            self.kv_b_proj = weights.matrix(f"{name}.kv_b_proj.weight")
        self.o_proj = RowParallelLinear(weights, f"{name}.o_proj", world)

    def __call__(self, layer: int, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """[tokens, hidden] -> the same."""
        q, latent = self._project(x)
        c, k_rotated = latent.split(self.latent_sizes, dim=-1)
        if rotation is not None:
            rotate_(q[..., self.query_sizes[0] :], rotation)
            rotate_(k_rotated[:, None], rotation)
        c = self.kv_norm(c)
        if not self.absorbed:
            return self.o_proj(self._expanded(layer, q, c, k_rotated, attend))
        latent = torch.cat([c, k_rotated], dim=-1)
        out = attend.latent(layer, self._absorbing(q), latent)
        values = torch.bmm(out.transpose(0, 1), self.to_values.transpose(1, 2))
        return self.o_proj(values.transpose(0, 1).flatten(1))

    def _absorbing(self, q: Tensor) -> Tensor:
        """Queries to latents and rotated keys: [tokens, heads, rank + rope]."""
        plain, rotated = q.split(self.query_sizes, dim=-1)
        absorbed = torch.bmm(plain.transpose(0, 1), self.to_keys).transpose(0, 1)
        return torch.cat([absorbed, rotated], dim=-1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [tokens, heads, head_dim], and latents with keys, [tokens, rank + rope]."""
        down = [projection(x) for projection in self.down]
        if self.q_norm is None:
            (latent,) = down
            q = x
        else:
            assert self.q_rank is not None
            q, latent = down if len(down) > 1 else down[0].tensor_split([self.q_rank], dim=-1)
            q = self.q_norm(q)
        return self.q_proj(q).unflatten(-1, (self.heads, -1)), latent

    def _expanded(
        self, layer: int, q: Tensor, c: Tensor, k_rotated: Tensor, attend: Attend
    ) -> Tensor:
        """Attention with keys and values of every head, values padded to the size of keys."""
        kv = self.kv_b_proj(c).unflatten(-1, (self.heads, -1))
        k, v = kv.split([self.query_sizes[0], self.value_dim], dim=-1)
        k = torch.cat([k, k_rotated[:, None].expand(-1, self.heads, -1)], dim=-1)
        v = F.pad(v, (0, k.shape[-1] - self.value_dim))
        out = attend(layer, q, k, v).unflatten(-1, (self.heads, -1))
        return out[..., : self.value_dim].flatten(1)

    def _halves(self, weights: Weights, name: str) -> tuple[Tensor, Tensor]:
        """What makes keys, [heads, nope, rank], and values, [heads, value_dim, rank]."""
        if name not in weights.matrices:
            weight = weights.tensors[name]
        else:
            # Held in another form: what it makes of unit vectors are its columns. A scale of all
            # inputs, which suits latents, need not suit those.
            like = weights.tensors[name.replace("kv_b_proj", "kv_a_layernorm")]
            units = torch.eye(self.latent_sizes[0], dtype=like.dtype, device=like.device)
            weight = weights.matrix(name).exact()(units).T.contiguous()
        halves = weight.unflatten(0, (self.heads, -1))
        to_keys, to_values = halves.split([self.query_sizes[0], self.value_dim], dim=1)
        return to_keys, to_values


def _down(attention: LatentAttention) -> tuple[str, ...]:
    if attention.q_lora_rank is None:
        return ("kv_a_proj_with_mqa",)
    return ("fused_qkv_a_proj",) if attention.absorbed else ("q_a_proj", "kv_a_proj_with_mqa")
