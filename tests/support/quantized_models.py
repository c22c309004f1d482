"""Tiny checkpoints of every quantization, of random values that make a model which says something.

They have the tensors that producers write, which `tests/model/test_quantization.py` holds against
the producers themselves.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.make_quantized_data import EXPERTS, LLAMA
from support.quantized import DATA
from tightfit.model.families import model_spec
from tightfit.model.sources import expected_sources

LATENT: dict[str, Any] = {
    **LLAMA,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}
GPT_OSS: dict[str, Any] = {
    **LLAMA,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 256,
    "sliding_window": 128,
    "attention_bias": True,
    "layer_types": ["full_attention"],
    "rope_theta": 150_000,
    "swiglu_limit": 7.0,
}
MODELS: Mapping[str, dict[str, Any]] = {
    "dense": LLAMA,
    "experts": EXPERTS,
    "five_experts": {**EXPERTS, "num_experts": 5},
    "latent": LATENT,
    "gpt_oss": GPT_OSS,
    "odd_gpt_oss": {**GPT_OSS, "intermediate_size": 352, "hidden_size": 288},
}
SECTIONS: Mapping[str, dict[str, Any]] = {
    **DATA["sections"],
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
_TORCH = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}
_DEVIATION = 0.08


def quantized_config(scheme: str, model: str) -> dict[str, Any]:
    section = json.loads(json.dumps(SECTIONS[scheme]))
    if "config_groups" in section:
        section["ignore"] += [f"model.layers.{i}.mlp.gate" for i in range(2)]
    if scheme == "awq" and model != "dense":
        router = "mlp.gate" if model.endswith("experts") else "1.mlp.gate"
        section["modules_to_not_convert"] = ["lm_head", router]
    return {**MODELS[model], "quantization_config": section}


def make_quantized_model(scheme: str, model: str, directory: Path, **changes: Any) -> Path:
    """Write a model in a scheme; the same arguments give the same bytes."""
    return write_quantized(quantized_config(scheme, model) | changes, directory)


def write_quantized(config: dict[str, Any], directory: Path) -> Path:
    """Write a random model of a quantized config; the same config gives the same bytes."""
    generator = torch.Generator().manual_seed(11)
    expected = expected_sources(model_spec(config))
    tensors = {
        name: _tensor(name, shape, _TORCH[dtype or "BF16"], generator)
        for name, (shape, dtype, _) in expected.items()
        if not name.endswith(".g_idx")
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    kind = name.rpartition(".")[2]
    noise = torch.randn(shape, generator=generator)
    if kind == "weight_shape":
        return torch.tensor([256, 256])
    if "scale" in kind and dtype is torch.uint8:
        return torch.randint(116, 120, shape, dtype=dtype, generator=generator)
    if "global_scale" in kind:
        return torch.full(shape, 100.0, dtype=dtype)
    if "input_scale" in kind:
        return torch.full(shape, 0.02, dtype=dtype)
    if "scale" in kind:
        return ((1 + noise.abs()) * _DEVIATION / 90).to(dtype)
    if dtype is torch.float8_e4m3fn:
        return (noise * 45).to(dtype)
    if dtype is torch.int8:
        return (noise * 45).clamp(-127, 127).to(dtype)
    if not dtype.is_floating_point:
        top = 2**31 if dtype is torch.int32 else 256
        low = -top if dtype is torch.int32 else 0
        return torch.randint(low, top, shape, dtype=dtype, generator=generator)
    if kind.endswith("bias") or len(shape) == 1:
        return (noise * 0.1 + (kind == "weight")).to(dtype)
    return (noise * _DEVIATION).to(dtype)
