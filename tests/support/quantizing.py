"""Checkpoints by `tightfit quantize`, and their tensors by module."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tightfit.cli.main import build
from tightfit.codecs import codec
from tightfit.model.quantization.written import COMPRESSED_TENSORS, Choice

CHOICES: Mapping[str, Choice] = {
    **{
        choice.label: choice
        for choice in (
            Choice(scheme="fp8-tensor"),
            Choice(scheme="fp8-channel"),
            Choice(scheme="fp8-block"),
            Choice(scheme="int8"),
            Choice(scheme="w8a16", group_size=-1),
            Choice(scheme="w8a16", group_size=64),
            Choice(scheme="w4a16", group_size=-1),
            Choice(scheme="w4a16", group_size=32),
            Choice(scheme="w4a16", group_size=128),
            Choice(scheme="w4a16-asym", group_size=64),
            Choice(scheme="nvfp4a16"),
            Choice(scheme="mxfp4"),
            Choice(scheme="mxfp8"),
            Choice(scheme="fp8-block", format="fp8"),
            Choice(scheme="w4a16", group_size=128, format="gptq"),
            Choice(scheme="w8a16", group_size=64, format="gptq"),
            Choice(scheme="w4a16-asym", group_size=128, format="awq"),
        )
    },
}
"""All schemes that need no calibration, in all formats, by label."""
COMPRESSED = [label for label, one in CHOICES.items() if one.format == COMPRESSED_TENSORS]
NOT_EXPERTS = ("fp8-tensor",)
"""What vLLM does not load of experts, so that it is refused."""
_ROOTS = ("weight", "weight_packed", "qweight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A checkpoint that was quantized."""

    directory: Path
    config: dict[str, Any]
    modules: Mapping[str, Mapping[str, Tensor]]
    """Tensors of quantized modules, by kind."""
    others: Mapping[str, Tensor]


def quantize(model: Path, out: Path, choice: Choice, *more: str) -> Quantized:
    """Run the command with a scheme for everything."""
    size = () if choice.group_size is None else ("--group-size", str(choice.group_size))
    return run_quantize(
        model, out, "--scheme", choice.scheme, "--format", choice.format, *size, *more
    )


def run_quantize(model: Path, out: Path, *options: str) -> Quantized:
    """Run the command in this process: torch is here already."""
    failed = build(["quantize"])(
        ["quantize", str(model), str(out), "--quiet", *options], standalone_mode=False
    )
    assert not failed
    return read_quantized(out)


def write_meant(quantized: Quantized, choice: Choice, directory: Path) -> Path:
    """A plain checkpoint of bfloat16 of what a quantized one means."""
    coder = codec(choice, torch.bfloat16)
    tensors = {
        f"{module}.weight": coder.decode(stored).to(torch.bfloat16).contiguous()
        for module, stored in quantized.modules.items()
    }
    directory.mkdir()
    save_file(
        {**quantized.others, **tensors},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {k: value for k, value in quantized.config.items() if k != "quantization_config"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def read_quantized(directory: Path) -> Quantized:
    """What the files hold."""
    tensors = load_all(directory)
    modules: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name in tensors:
        module, _, kind = name.rpartition(".")
        if kind in _ROOTS and any(f"{module}.{scale}" in tensors for scale in _scales()):
            modules[module] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in modules:
            modules[module][kind] = tensor
        else:
            others[name] = tensor
    config = json.loads((directory / "config.json").read_text())
    return Quantized(directory=directory, config=config, modules=modules, others=others)


def load_all(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _scales() -> Iterator[str]:
    yield from ("weight_scale", "weight_scale_inv", "scales")
