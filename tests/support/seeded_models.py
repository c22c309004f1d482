"""Small seeded checkpoints of any config that tightfit knows, made without transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tightfit.model.families import model_spec
from tightfit.model.sources import source_shapes

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
QWEN3_MOE: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
}


def write_seeded_model(config: dict[str, Any], directory: Path, *, seed: int = 5) -> Path:
    """Write the checkpoint that a config promises; some inputs of each matrix have outliers."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config["torch_dtype"])
    tensors = {}
    for name, shape in source_shapes(model_spec(config)).items():
        values = torch.randn(shape, generator=generator) * 0.05
        if len(shape) > 1:
            values[..., ::37] *= 8
        else:
            values += 1
        tensors[name] = values.to(dtype)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
