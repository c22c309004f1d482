"""What stands for a quantized weight: its codec, and the scales of its outputs and inputs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tightfit.codecs import Codec, Scales, Stored
from tightfit.codecs.decoders import codec_of
from tightfit.codecs.integers import Gptq
from tightfit.codecs.packing import unpack_words
from tightfit.errors import UnsupportedModelError
from tightfit.model.quantization.forms import Form
from tightfit.model.quantization.recipe import Inputs
from tightfit.runtime.loading.parameters import QuantizedWeight

_BESIDE = ("input_", "weight_shape")
"""Kinds that the weight does not depend on."""


def codec_forms(weight: QuantizedWeight) -> dict[str, Form]:
    """The forms that the weight depends on, by kind."""
    return {kind: form for kind, form in weight.forms.items() if not kind.startswith(_BESIDE)}


def codec(weight: QuantizedWeight) -> Codec:
    """The codec of a weight.

    Raises:
        UnsupportedModelError: a scheme that is not executed.
    """
    forms, values = weight.forms, codec_forms(weight)
    found = SymmetricGptq.of(values) or codec_of(values)
    known = weight.inputs is not None or not {"input_scale", "input_global_scale"} & forms.keys()
    if found is None or not known or "input_zero_point" in forms:
        kinds = ", ".join(f"{kind} {form.dtype or 'floats'}" for kind, form in forms.items())
        raise UnsupportedModelError(
            f"{weight.name} is quantized in a way that the built-in runtime does not execute: "
            f"{kinds}",
            hint="serve this checkpoint with vLLM",
        )
    return found


def input_scales(
    inputs: Inputs, tensors: Mapping[str, Tensor], matrices: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """A static scale of all inputs, and what NVFP4's scales were multiplied by, where there are.

    Args:
        inputs: how they are rounded.
        tensors: by kind.
        matrices: experts, which have their inputs rounded alike: none of them clips.
    """
    static = tensors.get("input_scale")
    overall = tensors.get("input_global_scale")
    if overall is not None:
        return None, overall.view(matrices, -1).amax(dim=1).min()
    if static is None:
        return None, None
    if inputs.dtype == "F4_E2M1":
        return None, 1 / static.max()
    return static.max(), None


def row_scales(weight: QuantizedWeight, scale: Tensor) -> Tensor:
    """A scale for each output, float32 [matrices, outputs]."""
    if not weight.forms["weight_scale"].rows:
        return by_part(weight, scale.float())
    return scale.float().view(-1, sum(weight.part_rows))


def by_part(weight: QuantizedWeight, values: Tensor) -> Tensor:
    """What each part of a matrix has, for each of its outputs: [matrices, outputs]."""
    parts = values.reshape(-1, len(weight.part_rows)).split(1, dim=1)
    spread = (part.expand(-1, rows) for part, rows in zip(parts, weight.part_rows, strict=True))
    return torch.cat(list(spread), dim=1)


class SymmetricGptq(Gptq):
    """GPTQ whose zero points are all alike, so that nobody holds them (vLLM's Marlin neither)."""

    @classmethod
    def of(cls, forms: Mapping[str, Form]) -> "SymmetricGptq | None":
        """The codec, if it is one of these forms."""
        packed = forms.get("qweight")
        if packed is None or packed.rows > 1 or "qzeros" in forms:
            return None
        bits = 32 // (packed.columns or 1)
        return cls(bits, forms["scales"].columns or 0, torch.bfloat16) if bits in (4, 8) else None

    def unpack(self, stored: Stored) -> tuple[Tensor, Scales]:
        """Codes and scales of what a checkpoint holds."""
        codes = unpack_words(stored["qweight"].T, self.bits).float().add_(self.lowest)
        scale = stored["scales"].T
        return codes, Scales(factor=scale.float(), stored=scale)
