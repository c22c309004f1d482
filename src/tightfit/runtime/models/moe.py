"""A mixture of experts: a router, and gated experts of which every token uses a few."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.model.blocks.mlp import MoE
from tightfit.planner.engines.builtin_memory import EXPERT_ROWS
from tightfit.runtime.dist import World
from tightfit.runtime.layers import Weights, activation


class MoELayer:
    """Every rank holds a share of every expert: w13 [experts, 2 * inner, hidden], w2 transposed."""

    def __init__(self, moe: MoE, weights: Weights, name: str, world: World) -> None:
        self.top_k = moe.top_k
        self.renormalize = moe.renormalize
        self.activation = activation(moe.activation)
        self.router = weights.tensors[f"{name}.gate.weight"]
        self.w13 = weights.experts(f"{name}.experts.w13_weight")
        self.w2 = weights.experts(f"{name}.experts.w2_weight")
        self.world = world

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> the same; experts take their tokens a few rows at a time."""
        scores = F.linear(x, self.router).float().softmax(dim=-1)
        shares, experts = scores.topk(self.top_k, dim=-1)
        if self.renormalize:
            shares /= shares.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            tokens, choice = (experts == expert).nonzero(as_tuple=True)
            for rows, picks in zip(
                tokens.split(EXPERT_ROWS), choice.split(EXPERT_ROWS), strict=True
            ):
                gate, up = self.w13[expert](x[rows]).chunk(2, dim=-1)
                result = self.w2[expert](self.activation(gate).mul_(up))
                out.index_add_(0, rows, result.mul_(shares[rows, picks, None].to(x.dtype)))
        return self.world.all_reduce(out)
