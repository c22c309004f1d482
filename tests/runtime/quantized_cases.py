"""Weights of every scheme, and the tensors that stand for them, for tests of the kernels."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tightfit.codecs import codec as codec_of_choice
from tightfit.model.quantization import schemes
from tightfit.model.quantization.forms import Form, Forms
from tightfit.model.quantization.recipe import Inputs
from tightfit.model.quantization.written import Choice
from tightfit.runtime.loading.parameters import QuantizedWeight

COLUMNS = 256
TOKEN = Inputs(dtype="F8_E4M3")
CASES: Mapping[str, tuple[Choice, Forms, Inputs | None]] = {
    "fp8-tensor": (
        Choice(scheme="fp8-tensor"),
        schemes.per_tensor(schemes.FP8, static=False),
        TOKEN,
    ),
    "fp8-channel": (
        Choice(scheme="fp8-channel"),
        schemes.per_channel(schemes.FP8, static=False),
        TOKEN,
    ),
    "fp8 weights alone": (
        Choice(scheme="fp8-channel"),
        schemes.per_channel(schemes.FP8, static=False),
        None,
    ),
    "fp8-block": (
        Choice(scheme="fp8-block", format="fp8"),
        schemes.fp8_block(128, 128, scale="weight_scale_inv"),
        replace(TOKEN, group_size=128),
    ),
    "int8": (
        Choice(scheme="int8"),
        schemes.per_channel("I8", static=False),
        Inputs(dtype="I8"),
    ),
    "w8a16": (
        Choice(scheme="w8a16", group_size=128),
        schemes.pack_quantized(8, 128, symmetric=True),
        None,
    ),
    "w4a16": (
        Choice(scheme="w4a16", group_size=64),
        schemes.pack_quantized(4, 64, symmetric=True),
        None,
    ),
    "w4a16 whole rows": (
        Choice(scheme="w4a16", group_size=-1),
        schemes.pack_quantized(4, None, symmetric=True),
        None,
    ),
    "w4a16-asym": (
        Choice(scheme="w4a16-asym", group_size=32),
        schemes.pack_quantized(4, 32, symmetric=False),
        None,
    ),
    "gptq": (
        Choice(scheme="w4a16", group_size=128, format="gptq"),
        schemes.gptq(4, 128, symmetric=True),
        None,
    ),
    "gptq with zero points": (
        Choice(scheme="w4a16", group_size=64, format="gptq"),
        schemes.gptq(4, 64, symmetric=False),
        None,
    ),
    "gptq of 8 bits": (
        Choice(scheme="w8a16", group_size=64, format="gptq"),
        schemes.gptq(8, 64, symmetric=False),
        None,
    ),
    "awq": (
        Choice(scheme="w4a16-asym", group_size=64, format="awq"),
        schemes.awq(4, 64, zero_point=True),
        None,
    ),
    "nvfp4a16": (Choice(scheme="nvfp4a16"), schemes.nvfp4(activations=False), None),
    "nvfp4": (
        Choice(scheme="nvfp4"),
        schemes.nvfp4(activations=True),
        Inputs(dtype="F4_E2M1", group_size=16),
    ),
    "mxfp4": (Choice(scheme="mxfp4"), schemes.mxfp4(), None),
    "mxfp8": (
        Choice(scheme="mxfp8"),
        schemes.mxfp8(),
        Inputs(dtype="F8_E4M3", group_size=32, exponents=True),
    ),
}


def quantized(
    label: str, parts: tuple[int, ...], experts: int, columns: int = COLUMNS
) -> tuple[QuantizedWeight, dict[str, Tensor]]:
    """A weight of parts, each with scales of its own, and the tensors that stand for it."""
    choice, forms, inputs = CASES[label]
    by_kind = {form.kind: form for form in forms if form.only != "experts" and not form.dropped}
    codec = codec_of_choice(choice, torch.float16)
    matrices: list[dict[str, Tensor]] = []
    for _ in range(experts or 1):
        stored = []
        for i, rows in enumerate(parts):
            weight = torch.randn(rows, columns) * (0.1 + 0.2 * i)
            stored.append(codec.encode(weight, weight.abs().max()))
        matrices.append(
            {
                kind: joined(form, [one.get(kind) for one in stored])
                for kind, form in by_kind.items()
            }
        )
    tensors = {
        kind: torch.stack([one[kind] for one in matrices]) if experts else matrices[0][kind]
        for kind in by_kind
    }
    weight = QuantizedWeight(
        name="layer.weight",
        experts=experts,
        part_rows=parts,
        columns=columns,
        forms=by_kind,
        tensors={kind: kind for kind in by_kind},
        inputs=inputs,
    )
    return weight, tensors


def joined(form: Form, parts: list[Tensor | None]) -> Tensor:
    """What a rank holds of all parts."""
    found = [torch.tensor([40.0]) if part is None else part for part in parts]
    if not form.rows:
        return found[0] if form.shared else torch.cat([part.flatten() for part in found])
    if form.kind == "weight_scale" and not form.columns:
        found = [part.float() for part in found]
    return torch.cat(found, dim=1 if form.transposed else 0)


def clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {kind: tensor.clone() for kind, tensor in tensors.items()}
