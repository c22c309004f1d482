"""MLPs, with a gate or without."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.runtime.layers import Gated, Linear, RowParallelLinear, Weights
from tightfit.runtime.ranks.world import World


class MLP:
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` where there is no gate.

    Args:
        mlp: its description.
        weights: of the rank.
        name: of the module that it is in.
        world: ranks that sum up their results; None leaves that to the caller.

    Raises:
        UnsupportedModelError: an activation that is not modelled.
    """

    def __init__(self, mlp: DenseMLP, weights: Weights, name: str, world: World | None) -> None:
        name = f"{name}.{mlp.module}" if mlp.module else name
        self.up = Linear(weights, f"{name}.{'gate_up_proj' if mlp.gated else mlp.up}")
        self.activation = Gated(mlp.activation) if mlp.gated else ungated(mlp.activation)
        down = f"{name}.{'down_proj' if mlp.gated else mlp.down}"
        self.down = (
            Linear(weights, down) if world is None else RowParallelLinear(weights, down, world)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> the same."""
        return self.down(self.activation(self.up(x)))


def ungated(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that configs call so, where it may overwrite its argument.

    Raises:
        UnsupportedModelError: one that is not modelled.
    """
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {name!r} is not modelled", hint=f"modelled: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu2": lambda x: x.relu_().square_(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
}
