"""Names, shapes, dtypes and counts of real models equal those of transformers' own modules."""

import re
from collections.abc import Mapping
from typing import Any

import pytest

from support.configs import MODELS, read_config
from tightfit.model.families import _MODULES as FAMILIES
from tightfit.model.families import model_spec
from tightfit.model.parameters import parameter_count, parameters, plain_parameters
from tightfit.model.sources import source_shapes
from tightfit.model.spec import ModelSpec
from tightfit.planner.weights import checkpoint_bytes
from tightfit.units import dtype_bytes

Tensors = dict[str, tuple[str, tuple[int, ...]]]

_DTYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
}

_ALIASES = {"kimi_k2": "deepseek_v3", "minimax_m3": "minimax_m3_vl_text"}
"""Model types of vLLM's own config classes that transformers has under another name."""
_BUFFERS = ("e_score_correction_bias", "expert_bias", "tid2eid")
"""Of checkpoints, which transformers keeps as buffers and engines as parameters."""
_CLASSES = {
    "KimiK25ForConditionalGeneration": "Kimi_K25ForConditionalGeneration",
    "MPTForCausalLM": "MptForCausalLM",
    "MiniMaxM3ForCausalLM": "MiniMaxM3VLForCausalLM",
    "MiniMaxM3SparseForCausalLM": "MiniMaxM3VLForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
}
"""Architectures that the Hub spells otherwise than transformers."""
_UNKNOWN = (
    "InternVLChatModel",
    "Phi3VForCausalLM",
    "DeepseekVLV2ForCausalLM",
    "KimiK3ForConditionalGeneration",
    "MiniMaxText01ForCausalLM",
    "MiniMaxM1ForCausalLM",
    "BaiChuanForCausalLM",
    "BaichuanForCausalLM",
    "ChatGLMModel",
    "DeciLMForCausalLM",
    "ExaoneForCausalLM",
    "InternLM2ForCausalLM",
    "MiMoForCausalLM",
    "MiniCPMForCausalLM",
    "OrionForCausalLM",
    "QWenLMHeadModel",
    "SolarForCausalLM",
    "DeepseekForCausalLM",
    "BailingMoeForCausalLM",
    "BailingMoeV2ForCausalLM",
    "Step3p5ForCausalLM",
    "TeleFLMForCausalLM",
    "KimiVLForConditionalGeneration",
    "TeleChat2ForCausalLM",
)
"""Architectures that transformers does not have; others hold them to what is known."""
_REMOTE = ("phi-2-msft",)
"""Configs of remote code."""
_OTHERWISE = ("LongCat-Flash-Chat",)
"""Models that transformers holds otherwise than their checkpoints; they have tests of their own."""
KNOWN = tuple(
    name
    for name in MODELS
    if read_config(name)["architectures"][0] not in _UNKNOWN and name not in (*_REMOTE, *_OTHERWISE)
)


def theirs(config: Mapping[str, Any], *, quantized: bool = False) -> tuple[Tensors, int]:
    """Every tensor of transformers' model, and its number of parameters without scales."""
    import torch
    import transformers
    from transformers.quantizers import AutoHfQuantizer

    if config["architectures"][0] == "Gemma3nForConditionalGeneration":
        pytest.importorskip("timm")
    values = {key: config[key] for key in config if key != "model_type"}
    quantization = values.pop("quantization_config", None)
    kind = _ALIASES.get(config["model_type"], config["model_type"])
    hf_config = transformers.CONFIG_MAPPING[kind](**values)
    with torch.device("meta"):
        torch.set_default_dtype(hf_config.dtype or torch.float32)
        try:
            architecture = config["architectures"][0]
            model = getattr(transformers, _CLASSES.get(architecture, architecture))(hf_config)
        finally:
            torch.set_default_dtype(torch.float32)
        if quantization is not None and quantized:
            quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=True)
            quantizer._process_model_before_weight_loading(model)
    model.tie_weights()
    buffers = {n: b for n, b in model.named_buffers() if n.endswith(_BUFFERS)}
    parameters = {**dict(model.named_parameters()), **buffers}
    found = {
        name: (_DTYPES[str(p.dtype).removeprefix("torch.")], tuple(p.shape))
        for name, p in parameters.items()
    }
    count = sum(p.numel() for name, p in parameters.items() if not name.endswith("_scale_inv"))
    return found, count


def ours(spec: ModelSpec) -> Tensors:
    """Every tensor of a checkpoint, with experts stacked as transformers 5 holds them."""
    shapes = source_shapes(spec)
    found: Tensors = {}
    for weight in parameters(spec):
        dtype = weight.dtype or spec.dtype
        if not weight.experts:
            found |= {p.source: (dtype, shapes[p.source]) for p in weight.parts}
            continue
        members = [[p.source.format(expert=e) for p in weight.parts] for e in range(weight.experts)]
        rows, columns = (sum(shapes[name][0] for name in members[0]), shapes[members[0][0]][1])
        assert all(sum(shapes[n][0] for n in names) == rows for names in members)
        fused = weight.name.replace("w13_weight", "gate_up_proj").replace("w2_weight", "down_proj")
        found[fused] = (dtype, (weight.experts, rows, columns))
    return {re.sub(r"\.block_sparse_moe\.", ".mlp.", name): value for name, value in found.items()}


@pytest.mark.parametrize("name", KNOWN)
def test_real_models(name: str) -> None:
    config = read_config(name)
    spec = model_spec(config)
    method = config.get("quantization_config", {}).get("quant_method")
    # transformers 5 renames the modules of other models when it loads a checkpoint.
    comparable = spec.is_plain and method in (None, "fp8")
    tensors, count = theirs(config, quantized=comparable)
    # transformers has these of Gemma 4 as buffers, and does not count them.
    buffers = (".layer_scalar", ".std_bias", ".std_scale")
    held = (weight for weight in plain_parameters(spec) if weight.name.endswith(buffers))
    assert parameter_count(spec) == count + sum(part.rows for w in held for part in w.parts)
    if not comparable:
        return
    assert ours(spec) == tensors
    total = 0
    for dtype, shape in tensors.values():
        elements = 1
        for extent in shape:
            elements *= extent
        total += dtype_bytes(dtype, elements)
    assert checkpoint_bytes(spec) == total


def test_longcat_holds_no_weights_for_choices_that_are_no_experts() -> None:
    """transformers allocates the first matrices of those too, which no checkpoint has."""
    config = read_config("LongCat-Flash-Chat")
    _, count = theirs(config)
    assert parameter_count(model_spec(config)) == count - 28 * 256 * (2 * 2048) * 6144


def test_every_family_has_a_real_model() -> None:
    """Architectures that differ by their names alone need no model each."""
    seen = {read_config(name)["architectures"][0] for name in MODELS}
    assert {FAMILIES[architecture] for architecture in seen} == set(FAMILIES.values())


def test_counts_as_published() -> None:
    published = {
        "Llama-3.1-8B": 8_030_261_248,
        "Llama-3.1-405B": 405_853_388_800,
        "Mixtral-8x7B-v0.1": 46_702_792_704,
        "Qwen2.5-7B": 7_615_616_512,
        "Qwen3-30B-A3B": 30_532_122_624,
        "SmolLM2-135M": 134_515_008,
        "gemma-2-2b-it": 2_614_341_888,
    }
    assert {n: parameter_count(model_spec(read_config(n))) for n in published} == published
