"""bfloat16 matrices in the order of oneDNN's kernels for CPUs.

Given a plain matrix, oneDNN puts it into that order for every product, which takes longer than the
product itself where there are few tokens.
"""

from functools import lru_cache

import torch
from torch import Tensor

from tightfit.runtime.loading.pages import forget


class ReorderedMatrix:
    """Takes the place of a bfloat16 tensor [outputs, inputs], whose memory is given back."""

    def __init__(self, weight: Tensor) -> None:
        self.outputs = len(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        forget(weight)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.outputs)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
        return out

    def exact(self) -> "ReorderedMatrix":
        """Itself."""
        return self


@lru_cache(maxsize=1)
def has_reordering() -> bool:
    """Whether this torch has the kernel and its order, and this CPU bfloat16: tried once.

    (`torch/_inductor/mkldnn_lowerings.py` is who else calls them.)
    """
    ones = torch.ones(16, 32, dtype=torch.bfloat16)
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        found = ReorderedMatrix(ones.clone())(ones)
    except (AttributeError, RuntimeError):
        return False
    return bool((found == 32).all())
