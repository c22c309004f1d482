"""A mixture of experts: a router, experts of which every token uses a few, and MLPs for all."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.model.blocks.mlp import DenseMLP, MoE
from tightfit.planner.engines.builtin_layers import EXPERT_ROWS
from tightfit.runtime.layers import Gated, Weights
from tightfit.runtime.models.grouped import GroupedExperts
from tightfit.runtime.models.mlp import MLP
from tightfit.runtime.models.routing import Router
from tightfit.runtime.ranks.world import World


class MoELayer:
    """The sum of the chosen experts' outputs and those of the MLPs that all tokens share.

    Args:
        moe: its description.
        beside: MLPs for all tokens that are beside it in the layer, not inside its module.
        weights: of the rank.
        name: of the layer.
        world: ranks, each with a share of every MLP.
    """

    def __init__(
        self, moe: MoE, beside: Sequence[DenseMLP], weights: Weights, name: str, world: World
    ) -> None:
        module = f"{name}.{moe.module}"
        self.router = Router(moe, weights, module)
        grouped = GroupedExperts.of(moe, weights, module)
        self.experts = grouped or Experts(moe, weights, module)
        self.shared = [MLP(mlp, weights, name, None) for mlp in beside]
        if moe.shared is not None:
            self.shared.append(MLP(moe.shared, weights, module, None))
        self.shared_gate: Tensor | None = None
        if moe.shared_gate is not None:
            self.shared_gate = weights.tensors[f"{module}.{moe.shared_gate}.weight"]
        self.world = world

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> the same."""
        out = self.experts(x, *self.router(x))
        for mlp in self.shared:
            result = mlp(x)
            if self.shared_gate is not None:
                result.mul_(F.linear(x, self.shared_gate).sigmoid_())
            out.add_(result)
        return self.world.all_reduce(out)


class Experts:
    """Every rank holds a share of every expert: w13 [experts, 2 * inner, hidden], w2 transposed."""

    def __init__(self, moe: MoE, weights: Weights, name: str) -> None:
        self.gated = Gated(moe.activation, alternating=moe.names.alternating)
        self.w13 = weights.experts(f"{name}.experts.w13_weight")
        self.w2 = weights.experts(f"{name}.experts.w2_weight")
        self.w13_bias = weights.tensors.get(f"{name}.experts.w13_bias")
        self.w2_bias = weights.tensors.get(f"{name}.experts.w2_bias")

    def __call__(self, x: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """This rank's part of the sum; experts take their tokens a few rows at a time.

        On a GPU every expert takes all tokens, so that nothing waits for the device and CUDA graphs
        can hold it: what is here rather than in `GroupedExperts` is there to be right, not fast.

        Args:
            x: [tokens, hidden].
            shares: what each chosen expert counts, float32 [tokens, top_k].
            experts: their numbers, int64 [tokens, top_k].

        Returns:
            [tokens, hidden].
        """
        out = torch.zeros_like(x)
        if x.is_cuda:
            self._add_all(x, shares, experts, out)
            return out
        for expert in experts.unique().tolist():
            tokens, choice = (experts == expert).nonzero(as_tuple=True)
            for rows, picks in zip(
                tokens.split(EXPERT_ROWS), choice.split(EXPERT_ROWS), strict=True
            ):
                result = self._expert(expert, x[rows])
                out.index_add_(0, rows, result.mul_(shares[rows, picks, None].to(x.dtype)))
        return out

    def _add_all(self, x: Tensor, shares: Tensor, experts: Tensor, out: Tensor) -> None:
        for expert in range(len(self.w13)):
            chosen = experts == expert
            share = shares.masked_fill(~chosen, 0).sum(dim=1, keepdim=True).to(x.dtype)
            elsewhere = ~chosen.any(dim=1, keepdim=True)
            for first in range(0, len(x), EXPERT_ROWS):
                rows = slice(first, first + EXPERT_ROWS)
                result = self._expert(expert, x[rows]).mul_(share[rows])
                # A token that is not the expert's may have no number there.
                out[rows].add_(result.masked_fill_(elsewhere[rows], 0))

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        w13_bias = None if self.w13_bias is None else self.w13_bias[expert]
        w2_bias = None if self.w2_bias is None else self.w2_bias[expert]
        return self.w2[expert](self.gated(self.w13[expert](x, w13_bias)), w2_bias)
