"""The router of a mixture of experts: which experts a token uses, and how much each counts.

Formulas: DeepSeek V2 (arXiv 2405.04434, 2.2), V3 (arXiv 2412.19437, 2.1.2), and vLLM's
`fused_moe/router`. A softmax of only the chosen logits is a softmax of all, renormalized.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.model.blocks.mlp import MoE
from tightfit.runtime.layers import Weights


class Router:
    """Scores all experts, whole on every rank, and chooses `top_k` of them for each token."""

    def __init__(self, moe: MoE, weights: Weights, name: str) -> None:
        router = f"{name}.{moe.router}"
        self.weight = weights.tensors[f"{router}.weight"]
        self.bias = weights.tensors.get(f"{router}.bias")
        self.correction: Tensor | None = None
        if moe.correction_bias is not None:
            self.correction = weights.tensors[f"{name}.{moe.correction_bias}"].flatten()
        self.top_k = moe.top_k
        self.renormalize = moe.renormalize
        self.routing = moe.routing

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What each chosen expert counts, float32, and its number, int64: [tokens, top_k] each."""
        logits = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        if logits.is_cuda:
            return self._choose_at_once(logits)
        logits = logits.float()
        scores = logits.sigmoid() if self.routing.sigmoid else logits.softmax(dim=-1)
        ranked = scores if self.correction is None else scores + self.correction
        if self.routing.groups > 1:
            ranked = self._in_best_groups(ranked)
        shares, experts = ranked.topk(self.top_k, dim=-1)
        if self.correction is not None:
            shares = scores.gather(1, experts)
        if self.renormalize:
            shares /= shares.sum(dim=-1, keepdim=True)
        if self.routing.scale != 1.0:
            shares *= self.routing.scale
        return shares, experts

    def _choose_at_once(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        from tightfit.runtime.kernels.routing import choose

        return choose(
            logits,
            self.top_k,
            renormalize=self.renormalize,
            sigmoid=self.routing.sigmoid,
            correction=self.correction,
            groups=self.routing.groups,
            top_groups=self.routing.top_groups,
            scale=self.routing.scale,
        )

    def _in_best_groups(self, ranked: Tensor) -> Tensor:
        """The same with -inf for the experts of all other groups."""
        grouped = ranked.unflatten(1, (self.routing.groups, -1))
        if self.correction is None:
            strengths = grouped.amax(dim=-1)
        else:
            strengths = grouped.topk(2, dim=-1).values.sum(dim=-1)
        best = strengths.topk(self.routing.top_groups, dim=-1).indices
        others = torch.ones_like(strengths, dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(others[..., None], float("-inf")).flatten(1)
