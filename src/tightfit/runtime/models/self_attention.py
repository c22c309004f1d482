"""Attention with keys and values of its own: projections, norms of heads, rope."""

from torch import Tensor

from tightfit.model.blocks.attention import Attention, QKNorm, head_axes
from tightfit.model.layout import Rank
from tightfit.model.spec import ModelSpec
from tightfit.planner.engines.builtin_memory import NORM_ROWS
from tightfit.runtime.attention.base import Attend
from tightfit.runtime.layers import (
    Linear,
    RMSNorm,
    RowParallelLinear,
    Weights,
    sums_of_squares,
)
from tightfit.runtime.models.norms import make_norm
from tightfit.runtime.ranks.world import World
from tightfit.runtime.rope import HeadNorms, Rotation, rotate_


class SelfAttention:
    """Fused projection, optional norms of queries and keys, rope, attention, output projection."""

    def __init__(
        self,
        spec: ModelSpec,
        attention: Attention,
        weights: Weights,
        name: str,
        rank: Rank,
        world: World,
    ) -> None:
        queries, keys = (axis.span(rank)[1] for axis in head_axes(attention))
        self.head_dim = attention.head_dim
        self.heads = queries // self.head_dim
        self.kv_heads = keys // self.head_dim
        self.by_head = attention.names.by_head
        self.norms_after_rope = attention.norms_after_rope
        self.qkv_proj = Linear(weights, f"{name}.qkv_proj")
        self.o_proj = RowParallelLinear(weights, f"{name}.o_proj", world)
        self.qk_norm: QKNormHead | QKNormFull | None = None
        if attention.qk_norm in (QKNorm.HEAD, QKNorm.MATRIX):
            self.qk_norm = QKNormHead(spec, attention, weights, name)
        elif attention.qk_norm is not QKNorm.NONE:
            self.qk_norm = QKNormFull(spec, attention, weights, name, rank, world)

    def __call__(self, layer: int, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """[tokens, hidden] -> the same."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.by_head:
            qkv = qkv.unflatten(1, (-1, 3)).transpose(1, 2).flatten(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        norms = None
        if self.qk_norm is not None and not self.norms_after_rope:
            norms = self.qk_norm(q, k)
        if rotation is not None or norms is not None:
            rotate_(qkv[:, : self.heads + self.kv_heads], rotation, q_heads=self.heads, norms=norms)
        if self.norms_after_rope:
            assert isinstance(self.qk_norm, QKNormHead)
            self.qk_norm.apply_(q, k)
        return self.o_proj(attend(layer, q, k, v))


class QKNormHead:
    """Each head of queries and keys normalized by itself."""

    def __init__(self, spec: ModelSpec, attention: Attention, weights: Weights, name: str) -> None:
        names = attention.names
        self.q_norm, self.k_norm = (
            make_norm(spec, weights.tensors, f"{name}.{norm}")
            for norm in (names.query_norm, names.key_norm)
        )

    def __call__(self, q: Tensor, k: Tensor) -> HeadNorms | None:
        """[tokens, heads, head_dim] each, in place; on a GPU, what `rotate_` is to do."""
        q_norm, k_norm = self.q_norm, self.k_norm
        if q.is_cuda and isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm):
            return HeadNorms(
                q_weight=q_norm.weight,
                k_weight=k_norm.weight,
                eps=q_norm.eps,
                unit_offset=q_norm.unit_offset,
            )
        self.apply_(q, k)
        return None

    def apply_(self, q: Tensor, k: Tensor) -> None:
        """[tokens, heads, head_dim] each, in place."""
        q.copy_(self.q_norm(q))
        k.copy_(self.k_norm(k))


class QKNormFull:
    """All heads of all ranks normalized together: ranks add their sums of squares.

    KV heads that several ranks hold must count once, so each of those ranks gives a part of their
    squares.
    """

    def __init__(
        self,
        spec: ModelSpec,
        attention: Attention,
        weights: Weights,
        name: str,
        rank: Rank,
        world: World,
    ) -> None:
        self.eps = spec.norm_eps
        self.world = world
        axes = head_axes(attention)
        names = attention.names
        self.weights: list[Tensor] = []
        for norm, axis in zip((names.query_norm, names.key_norm), axes, strict=True):
            weight = weights.tensors[f"{name}.{norm}.weight"]
            if attention.qk_norm is QKNorm.FULL:
                first, rows = axis.span(rank)
                weight = weight[first : first + rows]
            self.weights.append(weight.unflatten(0, (-1, attention.head_dim)))
        copies = max(1, world.tp_size // attention.num_kv_heads)
        self.features = (axes[0].rows, axes[1].rows * copies)

    def __call__(self, q: Tensor, k: Tensor) -> HeadNorms | None:
        """[tokens, heads, head_dim] each, in place; on a GPU, what `rotate_` is to do."""
        totals = self.world.all_reduce(sums_of_squares(q, k))
        if q.is_cuda:
            q_weight, k_weight = self.weights
            return HeadNorms(
                q_weight=q_weight,
                k_weight=k_weight,
                eps=self.eps,
                squares=totals,
                features=self.features,
            )
        for x, total, weight, features in zip(
            (q, k), totals, self.weights, self.features, strict=True
        ):
            scale = (total / features + self.eps).rsqrt_()[:, None, None]
            for rows, factor in zip(x.split(NORM_ROWS), scale.split(NORM_ROWS), strict=True):
                rows.copy_(rows.float().mul_(factor).mul_(weight))
        return None
