"""Scales of activations that are in a checkpoint: of NVFP4's inputs, and of an fp8 KV cache."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tightfit.codecs.grids import FP4_MAX, FP8_MAX
from tightfit.quantize.matrices import Matrix

INPUT_SCALE = "input_global_scale"
_SMALLEST = 1e-12


class Observer:
    """The largest absolute values of inputs by module, and of keys and values."""

    def __init__(self) -> None:
        self.inputs: dict[str, float] = {}
        self.keys = self.values = 0.0

    def on_input(self, modules: tuple[str, ...], x: Tensor) -> None:
        """Inputs `[tokens, columns]` of modules that share them."""
        if len(x):
            largest = float(x.abs().amax())
            for module in modules:
                self.inputs[module] = max(self.inputs.get(module, 0.0), largest)

    def on_cache(self, keys: Tensor, values: Tensor) -> None:
        """As a cache would hold them."""
        self.keys = max(self.keys, float(keys.abs().amax()))
        self.values = max(self.values, float(values.abs().amax()))

    def input_scales(self, groups: Iterable[Sequence[Matrix]]) -> dict[str, Tensor]:
        """`input_global_scale` by name: float32 `[1]`, what the scales of inputs are divided by.

        (compressed-tensors' `generate_gparam`: 448 * 6 / the largest value.) Matrices of a group
        share one; experts that no token reached get that of the busiest.

        Args:
            groups: matrices that engines hold as one.
        """
        found: dict[str, Tensor] = {}
        wanted = [group for group in groups if INPUT_SCALE in group[0].outputs]
        experts = [self.inputs.get(group[0].module, 0.0) for group in wanted]
        for group, largest in zip(wanted, experts, strict=True):
            amax = largest or max(experts) or 1.0
            scale = torch.tensor([FP8_MAX * FP4_MAX / max(amax, _SMALLEST)])
            found |= {matrix.outputs[INPUT_SCALE].name: scale for matrix in group}
        return found

    def cache_scales(self, attention: str) -> Mapping[str, Tensor]:
        """`k_scale` and `v_scale` of an attention module, float32 `[1]`: e4m3 times them.

        (vLLM 0.32's `layers/quantization/kv_cache.py`.)
        """
        return {
            f"{attention}.{kind}_scale": torch.tensor([max(amax, _SMALLEST) / FP8_MAX])
            for kind, amax in (("k", self.keys), ("v", self.values))
        }
