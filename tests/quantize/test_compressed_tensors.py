"""compressed-tensors reads what we write as we do, to the bit, and would have written the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.make_quantized_data import EXPERTS, LLAMA
from support.quantizing import CHOICES, COMPRESSED, NOT_EXPERTS, Quantized, load_all, quantize
from support.seeded_models import write_seeded_model
from tightfit.codecs import codec

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.utils.match import match_quantizable_tensors

MODELS = {"dense": LLAMA, "experts": EXPERTS}
DTYPES = ("bfloat16", "float16", "float32")
CASES = [
    *((label, "dense", "bfloat16") for label in COMPRESSED),
    *((label, "experts", "bfloat16") for label in COMPRESSED if label not in NOT_EXPERTS),
    *((label, "dense", dtype) for label in COMPRESSED for dtype in DTYPES[1:]),
]
every_case = pytest.mark.parametrize(("label", "model", "dtype"), CASES)
Made = tuple[dict[str, Tensor], Quantized]
Make = Callable[[str, str, str], Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Tensors of the plain model and the quantized one; each is made once."""
    root = tmp_path_factory.mktemp("quantized")
    found: dict[tuple[str, str, str], Made] = {}

    def made(label: str, model: str, dtype: str) -> Made:
        if (label, model, dtype) not in found:
            plain = root / f"{model}-{dtype}"
            if not plain.exists():
                write_seeded_model({**MODELS[model], "torch_dtype": dtype}, plain)
            out = root / f"{len(found)}"
            found[label, model, dtype] = load_all(plain), quantize(plain, out, CHOICES[label])
        return found[label, model, dtype]

    return made


def scheme_of(quantized: Quantized) -> tuple[QuantizationScheme, type[BaseCompressor], list[str]]:
    """As compressed-tensors reads the config: its scheme, its compressor, its ignored names."""
    config = QuantizationConfig.model_validate(quantized.config["quantization_config"])
    (scheme,) = config.config_groups.values()
    assert scheme.format == infer_module_format(torch.nn.Linear, scheme) == config.format
    return scheme, BaseCompressor.get_value_from_registry(scheme.format), config.ignore


def same_bits(found: Tensor, expected: Tensor) -> bool:
    views = (one.reshape(-1).view(torch.uint8) for one in (found, expected))
    return (found.shape, found.dtype) == (expected.shape, expected.dtype) and torch.equal(*views)


@every_case
def test_decompressed_to_our_values(make: Make, label: str, model: str, dtype: str) -> None:
    _, quantized = make(label, model, dtype)
    scheme, compressor, _ = scheme_of(quantized)
    coder = codec(CHOICES[label], getattr(torch, dtype))
    assert quantized.modules
    for module, stored in quantized.modules.items():
        theirs = compressor.decompress(dict(stored), scheme)["weight"]
        # Of 4 bits and of powers of two it makes bfloat16, whatever the model is.
        assert theirs.dtype is getattr(torch, dtype) or "fp4" in label or "mx" in label
        assert same_bits(theirs, coder.decode(stored).to(theirs.dtype)), module


@every_case
def test_it_finds_our_modules(make: Make, label: str, model: str, dtype: str) -> None:
    plain, quantized = make(label, model, dtype)
    scheme, compressor, ignored = scheme_of(quantized)
    kinds = compressor.compression_param_names(scheme)
    tensors = load_all(quantized.directory)
    found = match_quantizable_tensors(tensors, ignored, scheme.targets, [kinds[0]])
    routers_and_head = {"lm_head", "model.embed_tokens"}
    assert {name for name, _ in found} - routers_and_head == quantized.modules.keys()
    for module, stored in quantized.modules.items():
        # A scale of all weights belongs to NVFP4 alone, though MXFP4's compressor names one too.
        assert stored.keys() == set(kinds) - ({"weight_global_scale"} if "mx" in label else set())
        assert f"{module}.weight" in plain
    for name, tensor in quantized.others.items():
        assert same_bits(tensor, plain[name]), name


@every_case
def test_compressed_to_our_bytes(make: Make, label: str, model: str, dtype: str) -> None:
    """With our scales, and weights of float32, so that it divides as exactly as we do."""
    plain, quantized = make(label, model, dtype)
    scheme, compressor, _ = scheme_of(quantized)
    coder = codec(CHOICES[label], getattr(torch, dtype))
    for module, stored in quantized.modules.items():
        _, scales = coder.unpack(stored)
        given: dict[str, Any] = {
            "weight": plain[f"{module}.weight"].float(),
            "weight_scale": scales.factor,
        }
        if "weight_global_scale" in stored:
            given["weight_scale"] = stored["weight_scale"].float()
            given["weight_global_scale"] = stored["weight_global_scale"]
        if scales.zero is not None:
            given["weight_zero_point"] = (scales.zero - 8).to(torch.int8)
        # What it compiles to save time costs seconds here.
        with torch.compiler.set_stance("force_eager"):
            theirs = compressor.compress(given, scheme)
        for kind in theirs.keys() - {"weight_scale"}:
            assert torch.equal(*(_bytes(one[kind]) for one in (theirs, stored))), (module, kind)


def _bytes(tensor: Tensor) -> Tensor:
    """Without the signs of zeros of 4 bits, which it drops, and we keep."""
    data = tensor.reshape(-1).view(torch.uint8)
    if tensor.dtype is torch.uint8:
        for zero, place in ((0x08, 0x0F), (0x80, 0xF0)):
            data = torch.where((data & place) == zero, data & ~place, data)
    return data


@every_case
def test_its_scales_are_ours(make: Make, label: str, model: str, dtype: str) -> None:
    plain, quantized = make(label, model, dtype)
    scheme, _, _ = scheme_of(quantized)
    coder = codec(CHOICES[label], getattr(torch, dtype))
    for module, stored in quantized.modules.items():
        matrix = plain[f"{module}.weight"].float()
        least, most = matrix.aminmax()
        mine, overall = coder.unpack(stored)[1].factor, None
        rtol = 2 * torch.finfo(getattr(torch, dtype)).eps
        if label == "fp8-block":
            blocks = matrix.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
            least, most = blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3))
        elif label != "fp8-tensor":
            groups = coder.grouped(matrix)
            least, most = groups.amin(dim=-1), groups.amax(dim=-1)
        if label == "nvfp4a16":
            mine, overall = stored["weight_scale"].float(), stored["weight_global_scale"]
            # An e4m3 scale between two values may become either.
            rtol = 0.07
            assert overall <= generate_gparam(*matrix.aminmax())
        theirs, _ = calculate_qparams(least, most, scheme.weights, overall)
        if label == "fp8-tensor":
            # One for all that engines fuse.
            assert mine >= theirs * (1 - rtol)
        else:
            torch.testing.assert_close(mine, theirs, rtol=0 if "mx" in label else rtol, atol=0)


@pytest.mark.parametrize("shape", [(192, 576), (128, 200), (320, 128), (1, 130)])
def test_smaller_blocks_at_the_ends(shape: tuple[int, int]) -> None:
    """Told of the blocks; its decompressor infers them from the shapes, as equal ones."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    coder = codec(CHOICES["fp8-block"], torch.bfloat16)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    stored = coder.encode(matrix.clone())
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    theirs = dequantize(stored["weight"], stored["weight_scale"], args=args)
    assert same_bits(theirs.contiguous(), coder.decode(stored).to(torch.bfloat16))
