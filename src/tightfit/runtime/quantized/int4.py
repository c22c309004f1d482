"""int4 weights in the order of torch's kernel for CPUs, which takes bfloat16."""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from tightfit.codecs.integers import Integers
from tightfit.runtime.loading.parameters import QuantizedWeight
from tightfit.runtime.quantized.decoded import DecodedMatrix, matrix


class Int4Matrix:
    """int4 weights in the order of torch's kernel, with a scale and a zero point for each group.

    `packed` is uint8 [outputs, inputs / 2], and `scales` bfloat16 [groups, outputs, 2].
    """

    def __init__(self, packed: Tensor, scales: Tensor, group_size: int) -> None:
        self.packed = packed
        self.scales = scales
        self.group_size = group_size

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, self.group_size, self.scales
        )
        return out if bias is None else out.add_(bias)

    def exact(self) -> "Int4Matrix":
        """Itself: it rounds no inputs."""
        return self


@lru_cache(maxsize=1)
def has_int4_kernel() -> bool:
    """Whether this torch has the kernel and its order of weights: tried once."""
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_ONES, 1)
        scales = torch.ones(1, 16, 2, dtype=torch.bfloat16)
        x = torch.ones(1, 32, dtype=torch.bfloat16)
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)
    except (AttributeError, RuntimeError):
        return False
    return bool((found == 32 * (1 - _MIDDLE + 1)).all())


_ONES = torch.ones(16, 32, dtype=torch.int32)
_MIDDLE = 8
"""The code that means the zero point."""


def repacked(
    weight: QuantizedWeight, tensors: Mapping[str, Tensor], group: int
) -> tuple[Tensor, Tensor]:
    """Weights and scales for the kernel: those of all experts, or of one matrix.

    Args:
        weight: what the tensors stand for.
        tensors: by kind.
        group: inputs that share a scale.
    """
    rows, columns = sum(weight.part_rows), weight.columns
    count = weight.experts or 1
    packed = torch.empty(count, rows, columns // 2, dtype=torch.uint8)
    scales = torch.empty(count, columns // group, rows, 2, dtype=torch.bfloat16)
    for expert in range(count):
        held = {k: t[expert] for k, t in tensors.items()} if weight.experts else tensors
        one = matrix(weight, held)
        assert isinstance(one, DecodedMatrix)
        codec = one.codec
        assert isinstance(codec, Integers)
        for first, length, stored in one.pieces(64):
            codes, spans = codec.unpack(stored)
            some = slice(first, first + length)
            packed[expert, some] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                (codes - codec.lowest).int(), 1
            )
            scales[expert, :, some, 0] = spans.factor.T
            zero = 0.0 if spans.zero is None else spans.zero
            scales[expert, :, some, 1] = (spans.factor * (_MIDDLE + codec.lowest - zero)).T
    return packed, scales
