"""The arithmetic of the schemes: which codec encodes and decodes which."""

import torch

from tightfit.codecs.base import Codec as Codec
from tightfit.codecs.base import Scales as Scales
from tightfit.codecs.base import Stored as Stored
from tightfit.codecs.floats import Fp8Block, Fp8Channel, Fp8Tensor, MxFp8
from tightfit.codecs.fp4 import MxFp4, NvFp4
from tightfit.codecs.integers import Awq, Gptq, Int8, Packed
from tightfit.model.quantization.written import Choice


def codec(choice: Choice, dtype: torch.dtype) -> Codec:
    """The codec of a scheme for weights of a dtype, which is also that of most scales."""
    group = choice.group or 0
    symmetric = not choice.scheme.endswith("-asym")
    match choice.format, choice.scheme:
        case "gptq", "w4a16" | "w8a16":
            return Gptq(int(choice.scheme[1]), group, dtype)
        case "awq", "w4a16-asym":
            return Awq(group, dtype)
        case "fp8", "fp8-block":
            return Fp8Block(torch.float32, kind="weight_scale_inv")
        case "compressed-tensors", "fp8-tensor":
            return Fp8Tensor(dtype)
        case "compressed-tensors", "fp8-channel":
            return Fp8Channel(dtype)
        case "compressed-tensors", "fp8-block":
            return Fp8Block(dtype)
        case "compressed-tensors", "int8":
            return Int8(dtype)
        case "compressed-tensors", "w8a16" | "w4a16" | "w4a16-asym":
            return Packed(int(choice.scheme[1]), group, dtype, symmetric=symmetric)
        case "compressed-tensors", "nvfp4" | "nvfp4a16":
            return NvFp4()
        case "compressed-tensors", "mxfp4":
            return MxFp4()
        case "compressed-tensors", "mxfp8":
            return MxFp8()
    raise AssertionError(f"no codec of {choice}")
