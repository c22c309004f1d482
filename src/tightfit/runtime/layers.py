"""The parts of a decoder that every family shares. Weights are given, never created.

A layer takes its shapes from its tensors: how a weight is cut is known to `model.layout` alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.errors import UnsupportedModelError
from tightfit.planner.engines.builtin_memory import NORM_ROWS
from tightfit.runtime.ranks.world import World


class Matrix(Protocol):
    """The weight of a linear layer, however it is held."""

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`: [tokens, inputs] -> [tokens, outputs]."""
        ...

    def exact(self) -> "Matrix":
        """The same weight for inputs that its scheme would round and that must not be."""
        ...


class ExpertMatrices(ABC, Sequence[Matrix]):
    """The matrices of experts, of which each is put together when it is used: they are many."""

    @abstractmethod
    def _expert(self, index: int) -> Matrix:
        """One of them; the index is in range."""

    @overload
    def __getitem__(self, index: int) -> Matrix: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Matrix]: ...

    def __getitem__(self, index: int | slice) -> Matrix | Sequence[Matrix]:
        if isinstance(index, slice):
            return [self._expert(i) for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._expert(index)


class PlainMatrix:
    """A tensor [outputs, inputs]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        return F.linear(x, self.weight, bias)

    def exact(self) -> Matrix:
        """Itself."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A rank's parameters by name: tensors, and matrices that are not simply held as a tensor.

    `matrices` has one for a name, or one for each expert. `reorder` makes another form of a tensor,
    which is then no longer there.
    """

    tensors: Mapping[str, Tensor]
    matrices: Mapping[str, Sequence[Matrix]] = field(default_factory=dict)
    reorder: Callable[[str], Matrix] | None = None

    def matrix(self, name: str) -> Matrix:
        """The weight of a linear layer, which asks for it once."""
        if name in self.matrices:
            return self.matrices[name][0]
        if self.reorder is not None:
            return self.reorder(name)
        return PlainMatrix(self.tensors[name])

    def experts(self, name: str) -> Sequence[Matrix]:
        """The weights of all experts of a layer."""
        if name in self.matrices:
            return self.matrices[name]
        return [PlainMatrix(weight) for weight in self.tensors[name]]


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swigluoai": "swigluoai",
}
"""What configs call an activation, and what it is called here."""


class Gated:
    """`activation(gate) * up`, which come side by side, or one after the other in turn.

    `swigluoai` is that of gpt-oss, as vLLM calls it (`SwigluOAIAndMul`): both are clamped, and up
    counts from 1.

    Raises:
        UnsupportedModelError: an activation that no modelled family uses.
    """

    def __init__(self, name: str, *, alternating: bool = False) -> None:
        if name not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"activation {name!r} is not modelled",
                hint="modelled: silu, gelu, gelu_pytorch_tanh, swigluoai",
            )
        self.kind = _ACTIVATIONS[name]
        self.alternating = alternating

    def __call__(self, gate_up: Tensor) -> Tensor:
        """[tokens, 2 * features] -> [tokens, features]."""
        if gate_up.is_cuda:
            from tightfit.runtime.kernels import gated

            return gated.gated(gate_up, self.kind, alternating=self.alternating)
        if self.alternating:
            gate, up = gate_up[:, ::2], gate_up[:, 1::2]
        else:
            gate, up = gate_up.chunk(2, dim=-1)
        match self.kind:
            case "silu":
                return F.silu(gate).mul_(up)
            case "gelu":
                return F.gelu(gate).mul_(up)
            case "gelu_tanh":
                return F.gelu(gate, approximate="tanh").mul_(up)
        gate = gate.clamp(max=7.0)
        return torch.sigmoid(gate * 1.702).mul_(gate).mul_(up.clamp(-7.0, 7.0).add_(1))


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
        if self.world.tp_size == 1:
            return super().__call__(x)
        out = self.world.all_reduce(self.matrix(x))
        return out if self.bias is None else out.add_(self.bias)


class RMSNorm:
    """`x / rms(x) * weight`, in float32; Gemma multiplies by `1 + weight`.

    A CPU normalizes a few rows at a time, so that the float32 copies stay small.
    """

    def __init__(self, weight: Tensor, *, eps: float, unit_offset: bool) -> None:
        self.weight = weight
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of [rows, ..., features]."""
        if x.is_cuda:
            from tightfit.runtime.kernels import norms

            return norms.rms_norm(x, self.weight, eps=self.eps, unit_offset=self.unit_offset)
        if len(x) <= NORM_ROWS:
            return self._normalize(x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for i in range(0, len(x), NORM_ROWS):
            out[i : i + NORM_ROWS] = self._normalize(x[i : i + NORM_ROWS])
        return out

    def after_adding(self, delta: Tensor, x: Tensor, scale: float) -> Tensor:
        """Normalize `x += scale * delta`, [rows, features] each."""
        if x.is_cuda:
            from tightfit.runtime.kernels import norms

            return norms.rms_norm(
                x,
                self.weight,
                eps=self.eps,
                unit_offset=self.unit_offset,
                delta=delta,
                scale=scale,
            )
        return self(x.add_(delta, alpha=scale))

    def _normalize(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        if self.unit_offset:
            return F.rms_norm(x.float(), shape, 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, shape, self.weight, self.eps)


def sums_of_squares(q: Tensor, k: Tensor) -> Tensor:
    """Of all heads of a token: [tokens, heads, head_dim] each -> float32 [2, tokens]."""
    if q.is_cuda:
        from tightfit.runtime.kernels import norms

        return norms.sums_of_squares(q, k)
    return torch.stack(
        [
            torch.cat([rows.float().square().sum(dim=(1, 2)) for rows in x.split(NORM_ROWS)])
            for x in (q, k)
        ]
    )


class VocabEmbedding:
    """The rank's rows of the vocabulary; tokens of other ranks give zeros, and the ranks add up."""

    def __init__(self, weight: Tensor, first_token: int, world: World) -> None:
        self.weight = weight
        self.first_token = first_token
        self.world = world

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [tokens] -> [tokens, hidden]."""
        if self.world.tp_size == 1:
            return F.embedding(token_ids, self.weight)
        rows = token_ids - self.first_token
        elsewhere = (rows < 0) | (rows >= len(self.weight))
        out = F.embedding(rows.masked_fill_(elsewhere, 0), self.weight)
        return self.world.all_reduce(out.masked_fill_(elsewhere[:, None], 0))
