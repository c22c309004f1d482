"""Tiny multimodal checkpoints, quantized but for most towers, with lists of producers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.quantized_models import SECTIONS, write_quantized
from support.tiny_media import MEDIA

_TOWER = "re:vision_tower.*"
_PROJECTOR = "re:multi_modal_projector.*"


def _blocks(prefix: str, depth: int, names: tuple[str, ...]) -> list[str]:
    return [f"{prefix}.blocks.{i}.{name}" for i in range(depth) for name in names]


_QWEN2_5 = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_QWEN3 = ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
_MERGERS = [
    f"model.visual.{merger}.linear_fc{i}"
    for merger in ("merger", "deepstack_merger_list.0", "deepstack_merger_list.1")
    for i in (1, 2)
]

CASES: Mapping[tuple[str, str], list[str]] = {
    ("qwen2_vl", "awq"): ["visual"],
    ("qwen2_5_vl", "awq"): ["visual"],
    ("qwen2_5_vl", "FP8_DYNAMIC"): ["re:.*lm_head", "re:visual.*"],
    ("qwen2_5_vl", "W4A16"): [
        *_blocks("model.visual", 2, _QWEN2_5),
        "model.visual.merger.mlp.0",
        "model.visual.merger.mlp.2",
        "lm_head",
    ],
    ("qwen3_vl", "fp8 block"): [
        "lm_head",
        "model.visual.patch_embed.proj",
        "model.visual.pos_embed",
        *_blocks("model.visual", 2, _QWEN3),
        *_MERGERS,
    ],
    ("qwen3_vl", "FP8_DYNAMIC"): ["re:.*lm_head", "re:visual.*", "re:model.visual.*"],
    ("qwen3_vl_moe", "fp8 block"): [
        "lm_head",
        *_blocks("model.visual", 2, _QWEN3),
        *_MERGERS,
        *(f"model.language_model.layers.{i}.mlp.gate" for i in range(2)),
    ],
    ("qwen3_5", "fp8 block"): [
        "lm_head",
        *_blocks("model.visual", 2, _QWEN3),
        *_MERGERS[:2],
        "model.language_model.layers.0.linear_attn.in_proj_a",
        "model.language_model.layers.0.linear_attn.in_proj_b",
        "model.language_model.layers.0.linear_attn.conv1d",
    ],
    ("qwen3_5_moe", "FP8_DYNAMIC"): [
        "lm_head",
        "re:.*visual.*",
        "re:.*mlp.gate$",
        "re:.*shared_expert_gate$",
        "re:.*linear_attn.*",
    ],
    ("whisper", "FP8_DYNAMIC"): ["proj_out"],
    ("gemma3_mm", "W4A16"): ["re:.*lm_head", _TOWER, _PROJECTOR],
    ("gemma3_mm", "FP8_DYNAMIC"): ["re:.*lm_head", "re:.*vision_tower.*", _PROJECTOR],
    ("gemma4_mm", "modelopt NVFP4"): ["lm_head", "model.embed_vision*", "model.vision_tower*"],
    ("mistral3", "FP8_DYNAMIC"): ["language_model.lm_head", _TOWER, _PROJECTOR],
    ("mistral3", "W4A16"): ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
    ("llava", "FP8_DYNAMIC"): ["re:.*lm_head", _TOWER, _PROJECTOR],
    ("internvl_chat", "awq"): ["vision_model", "mlp1"],
    ("internvl", "FP8_DYNAMIC"): ["re:.*lm_head", "re:.*vision_tower.*", "re:.*projector.*"],
    ("llama4_mm", "FP8_DYNAMIC"): [
        "re:.*lm_head",
        "re:.*self_attn",
        "re:.*router",
        "re:vision_model.*",
        _PROJECTOR,
    ],
    ("kimi_k25", "W4A16"): [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
}
"""What is ignored, by model and scheme."""

_WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}
"""Blocks and groups of 128 are whole on two ranks."""
_SECTIONS = {"type": "mrope", "mrope_section": [16, 24, 24]}
_THIRDS = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
_QUARTER = {
    "mrope_interleaved": True,
    "mrope_section": [6, 5, 5],
    "partial_rotary_factor": 0.25,
    "rope_theta": 1e4,
    "rope_type": "default",
}
_SIZES: Mapping[str, dict[str, Any]] = {
    "qwen2_vl": {"hidden_size": 512, "rope_scaling": _SECTIONS},
    "qwen2_5_vl": {"hidden_size": 512, "rope_scaling": _SECTIONS, "tie_word_embeddings": False},
    "qwen3_vl": {"head_dim": 128, "rope_scaling": _THIRDS},
    "qwen3_vl_moe": {"head_dim": 128, "rope_scaling": _THIRDS},
    "qwen3_5": {"head_dim": 128, "rope_parameters": _QUARTER},
    "gemma3_mm": {"head_dim": 128},
    "mistral3": {"head_dim": 128},
    "internvl_chat": {"hidden_size": 512},
    "internvl": {"hidden_size": 512},
    "llama4_mm": {"head_dim": 128, "intermediate_size": 256, "intermediate_size_mlp": 512},
}


def quantized_media_config(model: str, scheme: str, ignored: list[str]) -> dict[str, Any]:
    """The config of a tiny model, with wider layers and a quantization."""
    config = json.loads(json.dumps(MEDIA[model])) | {"torch_dtype": "bfloat16"}
    text = next((config[key] for key in ("text_config", "llm_config") if key in config), config)
    text |= {key: size for key, size in _WIDE.items() if key in text} | _SIZES.get(model, {})
    vision = config.get("vision_config", {})
    for name in ("out_hidden_size", "text_hidden_size"):
        if name in vision:
            vision[name] = text["hidden_size"]
    if model == "qwen2_vl":
        vision["hidden_size"] = text["hidden_size"]
    section = json.loads(json.dumps(SECTIONS[scheme]))
    section["modules_to_not_convert" if scheme in ("awq", "fp8 block") else "ignore"] = ignored
    if model == "kimi_k25":
        # Published in the section of the decoder.
        section["config_groups"]["group_0"]["weights"]["group_size"] = 32
        text["quantization_config"] = section
    else:
        config["quantization_config"] = section
    return config


def make_quantized_media(model: str, scheme: str, directory: Path) -> Path:
    """Write one of `CASES`; the same arguments give the same bytes."""
    return write_quantized(quantized_media_config(model, scheme, CASES[model, scheme]), directory)
