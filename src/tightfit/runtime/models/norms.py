"""The norms of a model: RMSNorm, or a LayerNorm that subtracts the mean."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.model.spec import ModelSpec
from tightfit.planner.engines.builtin_memory import NORM_ROWS
from tightfit.runtime.layers import RMSNorm


class LayerNorm:
    """`(x - mean(x)) / std(x) * weight + bias` of the last dimension, in float32.

    A CPU normalizes a few rows at a time, a GPU all of them in PyTorch's kernel. A weight [heads,
    head_dim] is that of heads.
    """

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        eps: float,
        unit_offset: bool = False,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, ..., features] -> the same."""
        if x.is_cuda:
            return self.at_once(x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for i in range(0, len(x), NORM_ROWS):
            out[i : i + NORM_ROWS] = self._normalize(x[i : i + NORM_ROWS])
        return out

    def after_adding(self, delta: Tensor, x: Tensor, scale: float) -> Tensor:
        """Normalize `x += scale * delta`, [rows, features] each."""
        return self(x.add_(delta, alpha=scale))

    def at_once(self, x: Tensor) -> Tensor:
        """As when called, by a kernel that computes in float32 inside."""
        features = x.shape[-1:]
        weight, bias = self.weight, self.bias
        if weight is not None and weight.dim() > 1:
            return F.layer_norm(x, features, eps=self.eps).mul_(weight)
        if weight is not None and self.unit_offset:
            weight = 1 + weight
        return F.layer_norm(x, features, weight, bias, self.eps)

    def _normalize(self, x: Tensor) -> Tensor:
        normalized = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        if self.weight is not None:
            normalized.mul_(1 + self.weight.float() if self.unit_offset else self.weight)
        return normalized if self.bias is None else normalized.add_(self.bias)


Norm = RMSNorm | LayerNorm


def make_norm(spec: ModelSpec, tensors: Mapping[str, Tensor], name: str | None) -> Norm:
    """The norm of a model that is called `name`."""
    weight = tensors[f"{name}.weight"] if spec.norm_weights else None
    if weight is None or spec.norm_bias or spec.norm_centers:
        bias = tensors.get(f"{name}.bias")
        return LayerNorm(weight, bias, eps=spec.norm_eps, unit_offset=spec.norm_unit_offset)
    return RMSNorm(weight, eps=spec.norm_eps, unit_offset=spec.norm_unit_offset)
