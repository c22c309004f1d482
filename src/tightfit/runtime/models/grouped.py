"""Experts on a GPU: all of a layer in a few kernels, of which none waits for the host."""

import torch
from torch import Tensor

from tightfit.model.blocks.mlp import MoE
from tightfit.planner.engines.builtin_quantized import expert_tokens
from tightfit.runtime.kernels.packed import Packed
from tightfit.runtime.layers import Gated, Weights
from tightfit.runtime.quantized.packed import PackedExperts


class GroupedExperts:
    """What `Experts` does; tokens are sorted by expert on the device (`kernels.experts`)."""

    def __init__(
        self, moe: MoE, w13: PackedExperts, w2: PackedExperts, weights: Weights, name: str
    ) -> None:
        self.gated = Gated(moe.activation, alternating=moe.names.alternating)
        self.w13 = w13
        self.w2 = w2
        self.w13_bias = weights.tensors.get(f"{name}.experts.w13_bias")
        self.w2_bias = weights.tensors.get(f"{name}.experts.w2_bias")

    @classmethod
    def of(cls, moe: MoE, weights: Weights, name: str) -> "GroupedExperts | None":
        """Those of a layer, if they are on a GPU, and as kernels take them."""
        w13 = _stacked(weights, f"{name}.experts.w13_weight")
        w2 = _stacked(weights, f"{name}.experts.w2_weight")
        return None if w13 is None or w2 is None else cls(moe, w13, w2, weights, name)

    def __call__(self, x: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """This rank's part of the sum, some tokens at a time.

        Args:
            x: [tokens, hidden].
            shares: what each chosen expert counts, float32 [tokens, top_k].
            experts: their numbers, int64 [tokens, top_k].

        Returns:
            [tokens, hidden].
        """
        out = torch.empty_like(x)
        inner, hidden = self.w2.weight.columns, self.w2.weight.outputs
        step = expert_tokens(experts.shape[1], hidden, inner)
        for first in range(0, len(x), step):
            some = slice(first, first + step)
            self._some(x[some], shares[some], experts[some], out[some])
        return out

    def _some(self, x: Tensor, shares: Tensor, experts: Tensor, out: Tensor) -> None:
        from tightfit.runtime.kernels.experts import add_up, assign, block_for, grouped_matmul

        top_k, count = experts.shape[1], experts.numel()
        block = block_for(count, len(self.w13), x.dtype)
        sorted_experts = assign(experts.contiguous(), len(self.w13), block)
        inputs, scales = self.w13.inputs(x)
        inner = grouped_matmul(
            inputs,
            self.w13.weight,
            sorted_experts,
            top_k=top_k,
            activation=self.gated.kind,
            alternating=self.gated.alternating,
            bias=self.w13_bias,
            x_scales=scales,
            dtype=x.dtype,
        )
        del inputs
        inputs, scales = self.w2.inputs(inner)
        results = grouped_matmul(
            inputs,
            self.w2.weight,
            sorted_experts,
            top_k=1,
            bias=self.w2_bias,
            shares=shares.contiguous(),
            x_scales=scales,
            dtype=x.dtype,
        )
        add_up(results, top_k, out)


def _stacked(weights: Weights, name: str) -> PackedExperts | None:
    found = weights.matrices.get(name)
    if found is not None:
        return found if isinstance(found, PackedExperts) else None
    tensor = weights.tensors[name]
    if not tensor.is_cuda:
        return None
    return PackedExperts(Packed(kind="plain", values=tensor, columns=tensor.shape[-1]), None)
