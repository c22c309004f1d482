"""Tiny seeded checkpoints of every family, written by transformers, which is the oracle as well.

The shapes are chosen to show mistakes: an odd vocabulary (padding is visible), KV heads that must
be replicated, a head_dim unlike hidden/heads, biases and norms that are not trivially zero or one,
and several layers so that their numbers matter. `head_dim` is a multiple of 32 because vLLM's CPU
attention demands it.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from support.tiny_families import FAMILIES
from support.tiny_media import MEDIA, write_media_model

VOCAB_SIZE = 259
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.01 * i for i in range(16)],
    "long_factor": [1.0 + 0.5 * i for i in range(16)],
    "original_max_position_embeddings": 64,
}


_WINDOWED: dict[str, Any] = {"head_dim": 64, "query_pre_attn_scalar": 32, "sliding_window": 16}

# The config class in transformers, and what is different from `_COMMON`.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE, "head_dim": 64}),
    "llama_mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 64}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3Config", {}),
    "phi3_longrope": (
        "Phi3Config",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 64},
    ),
    "phi4_partial": ("Phi3Config", {"partial_rotary_factor": 0.5}),
    "gemma": ("GemmaConfig", {"head_dim": 64}),
    "gemma2": ("Gemma2Config", _WINDOWED),
    "gemma3": ("Gemma3TextConfig", {"num_hidden_layers": 7, **_WINDOWED}),
    "granite": (
        "GraniteConfig",
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "logits_scaling": 16.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0078125,
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"num_hidden_layers": 5, "sliding_window": 16}),
}

NAMES = tuple(RECIPES)


def make_tiny_model(
    name: str,
    directory: Path,
    *,
    dtype: str = "bfloat16",
    seed: int = 7,
    others: Mapping[str, Any] | None = None,
) -> Path:
    """Write the tiny checkpoint `name` to `directory`; the same arguments give the same bytes.

    `others` are values of its config instead of those of the recipe, and `seed` is for those that
    are not multimodal.
    """
    if name in MEDIA:
        return write_media_model(name, directory, dtype=dtype)
    import torch
    import transformers as T

    torch.manual_seed(1234)
    config_class, changes = (RECIPES | FAMILIES)[name]
    config = getattr(T, config_class)(**recipe(name) | dict(others or {}))
    config.dtype = getattr(torch, dtype)
    model = T.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_((noise * 0.1).to(parameter.dtype))
            else:
                parameter.copy_((noise * 0.08).to(parameter.dtype))
    model.save_pretrained(directory)
    if "architectures" in changes:
        path = directory / "config.json"
        document = json.loads(path.read_bytes())
        path.write_text(json.dumps(document | {"architectures": changes["architectures"]}))
    return directory


def recipe(name: str) -> dict[str, Any]:
    """The values that a family's config is made of; none where something else makes it."""
    _, changes = (RECIPES | FAMILIES).get(name, ("", {"own": True}))
    values = {key: value for key, value in changes.items() if key != "own"}
    return values if "own" in changes else _COMMON | values


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", default=NAMES)
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        print(make_tiny_model(name, arguments.directory / name))


if __name__ == "__main__":
    main()
