"""transformers loads what we write, and computes what it would with our dequantized weights.

It has no path without further packages for GPTQ's and AWQ's files on CPUs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.make_quantized_data import EXPERTS, LLAMA
from support.quantizing import CHOICES, COMPRESSED, NOT_EXPERTS, quantize, write_meant
from support.seeded_models import write_seeded_model
from tightfit.codecs import codec
from tightfit.model.quantization.written import Choice

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.slow

MODELS: Mapping[str, dict[str, Any]] = {"dense": LLAMA, "experts": EXPERTS}
UNREAD = {
    "fp8-block": "it takes scales of blocks for scales of rows",
    "int8": "it knows only packed integers",
    "w4a16-asym g64": "it passes on no zero points",
    "nvfp4a16": "it forgets the scale of all weights",
    "mxfp8": "it takes exponents for scales",
}
"""What transformers 5.23 cannot do with experts (`integrations/compressed_tensors.py`)."""
CASES = [
    (label, model)
    for label in [*COMPRESSED, "fp8-block (fp8)"]
    for model in MODELS
    if model == "dense" or label not in (*UNREAD, *NOT_EXPERTS)
]
INPUTS: Mapping[str, tuple[Choice, int]] = {
    "fp8-tensor": (Choice(scheme="fp8-channel"), 0),
    "fp8-channel": (Choice(scheme="fp8-channel"), 0),
    "fp8-block": (Choice(scheme="fp8-channel"), 128),
    "int8": (Choice(scheme="int8"), 0),
    "mxfp8": (Choice(scheme="mxfp8"), 0),
}
"""How activations are quantized where they are, and how many share a scale if not all of a token.

A token is to activations what an output is to weights.
"""
TOKENS = torch.tensor([[1, 5, 9, 33, 77, 200, 100, 300, 4, 8, 15, 16, 23, 42]])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    return {name: write_seeded_model(config, root / name) for name, config in MODELS.items()}


def load(directory: Path, **options: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    # What compressed-tensors compiles to save time costs seconds here.
    with torch.compiler.set_stance("force_eager"):
        return model(TOKENS).logits.float()


def round_inputs(model: nn.Module, modules: Mapping[str, object], label: str) -> None:
    """Let linear layers see quantized activations."""
    choice, together = INPUTS[label]
    coder = codec(choice, torch.bfloat16)

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (values,) = inputs
        rows = values.reshape(-1, together or values.shape[-1])
        scales = coder.scales(rows.float())
        factor = scales.factor[..., None]
        # compressed-tensors divides in the model's dtype, and so rounds twice.
        divided = (coder.grouped(rows) / factor.to(values.dtype)).float()
        codes = coder.codes((divided * factor).view(rows.shape), scales)
        return (coder.values(codes, scales).view(values.shape).to(values.dtype),)

    for name, module in model.named_modules():
        if name in modules:
            assert isinstance(module, nn.Linear)
            module.register_forward_pre_hook(rounded)


@pytest.mark.parametrize(("label", "model"), CASES)
def test_same_as_dequantized(
    plain: Mapping[str, Path], tmp_path: Path, label: str, model: str
) -> None:
    choice = CHOICES[label]
    quantized = quantize(plain[model], tmp_path / "quantized", choice)
    reference = load(write_meant(quantized, choice, tmp_path / "meant"))
    exact = logits(reference)
    found = load(quantized.directory)
    answer = logits(found)
    weights, expected = found.state_dict(), reference.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    if label not in INPUTS:
        assert torch.equal(answer, exact)
        return
    round_inputs(reference, quantized.modules, label)
    rounded = logits(reference)
    assert (answer - exact).norm() > 0.01 * exact.norm()
    assert (answer - rounded).norm() < 0.1 * (rounded - exact).norm()


@pytest.mark.parametrize(("label", "model"), [c for c in CASES if c[0] in COMPRESSED])
def test_dequantized_while_loading(
    plain: Mapping[str, Path], tmp_path: Path, label: str, model: str
) -> None:
    """As it is for fine-tuning: weights alone, whatever activations are to be."""
    from transformers import CompressedTensorsConfig

    choice = CHOICES[label]
    quantized = quantize(plain[model], tmp_path / "quantized", choice)
    reference = load(write_meant(quantized, choice, tmp_path / "meant"))
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    assert torch.equal(logits(load(quantized.directory, **options)), logits(reference))
