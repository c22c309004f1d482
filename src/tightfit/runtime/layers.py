"""The parts of a decoder that every family shares. Weights are given, never created.

A layer takes its shapes from its tensors: how a weight is cut is known to `model.layout` alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.errors import UnsupportedModelError
from tightfit.planner.engines.builtin_memory import NORM_ROWS
from tightfit.runtime.dist import World


class Matrix(Protocol):
    """The weight of a linear layer, however it is held."""

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`: [tokens, inputs] -> [tokens, outputs]."""
        ...


class PlainMatrix:
    """A tensor [outputs, inputs]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        return F.linear(x, self.weight, bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A rank's parameters by name: tensors, and matrices that are not simply held as a tensor.

    `matrices` has one for a name, or one for each expert.
    """

    tensors: Mapping[str, Tensor]
    matrices: Mapping[str, Sequence[Matrix]] = field(default_factory=dict)

    def matrix(self, name: str) -> Matrix:
        """The weight of a linear layer."""
        if name in self.matrices:
            return self.matrices[name][0]
        return PlainMatrix(self.tensors[name])

    def experts(self, name: str) -> Sequence[Matrix]:
        """The weights of all experts of a layer."""
        if name in self.matrices:
            return self.matrices[name]
        return [PlainMatrix(weight) for weight in self.tensors[name]]


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that a config calls `name`.

    Raises:
        UnsupportedModelError: a function that no modelled family uses.
    """
    match name:
        case "silu" | "swish":
            return F.silu
        case "gelu":
            return F.gelu
        case "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast":
            return lambda x: F.gelu(x, approximate="tanh")
    raise UnsupportedModelError(
        f"activation {name!r} is not modelled", hint="modelled: silu, gelu, gelu_pytorch_tanh"
    )


class Linear:
    """A matrix and perhaps a bias: the rank's share of the outputs."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.matrix = weights.matrix(f"{name}.weight")
        self.bias = weights.tensors.get(f"{name}.bias")

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        return self.matrix(x, self.bias)


class RowParallelLinear(Linear):
    """A linear layer whose inputs are shared among ranks: the sum over ranks is the result."""

    def __init__(self, weights: Weights, name: str, world: World) -> None:
        super().__init__(weights, name)
        self.world = world

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, local inputs] -> [tokens, outputs]; the bias, whole everywhere, counts once."""
        if self.world.size == 1:
            return super().__call__(x)
        out = self.world.all_reduce(self.matrix(x))
        return out if self.bias is None else out.add_(self.bias)


class RMSNorm:
    """`x / rms(x) * weight`, in float32; Gemma multiplies by `1 + weight`.

    Rows are normalized a few at a time, so that the float32 copies stay small.
    """

    def __init__(self, weight: Tensor, *, eps: float, unit_offset: bool) -> None:
        self.weight = weight
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of [rows, ..., features]."""
        if len(x) <= NORM_ROWS:
            return self._normalize(x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for i in range(0, len(x), NORM_ROWS):
            out[i : i + NORM_ROWS] = self._normalize(x[i : i + NORM_ROWS])
        return out

    def _normalize(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        if self.unit_offset:
            return F.rms_norm(x.float(), shape, 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, shape, self.weight, self.eps)


class VocabEmbedding:
    """The rank's rows of the vocabulary; tokens of other ranks give zeros, and the ranks add up."""

    def __init__(self, weight: Tensor, first_token: int, world: World) -> None:
        self.weight = weight
        self.first_token = first_token
        self.world = world

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [tokens] -> [tokens, hidden]."""
        if self.world.size == 1:
            return F.embedding(token_ids, self.weight)
        rows = token_ids - self.first_token
        elsewhere = (rows < 0) | (rows >= len(self.weight))
        out = F.embedding(rows.masked_fill_(elsewhere, 0), self.weight)
        return self.world.all_reduce(out.masked_fill_(elsewhere[:, None], 0))
