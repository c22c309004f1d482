from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.ranks import MAX_TOKENS, PROMPTS


@pytest.fixture(scope="session")
def uneven_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 heads, 3 KV heads and odd widths, as no even layout can cut them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=253,
        hidden_size=9 * 16,
        intermediate_size=201,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=128,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    path = tmp_path_factory.mktemp("uneven") / "uneven"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Any]:
    """transformers' model of a path, in float32."""
    from transformers import AutoModelForCausalLM

    loaded: dict[Path, Any] = {}

    def load(path: Path) -> Any:
        if path not in loaded:
            loaded[path] = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        return loaded[path]

    return load


@pytest.fixture(scope="session")
def reference_tokens(reference: Callable[[Path], Any]) -> Callable[[Path], list[list[int]]]:
    """transformers' greedy continuation of every prompt, one at a time."""
    found: dict[Path, list[list[int]]] = {}

    def tokens(path: Path) -> list[list[int]]:
        if path not in found:
            model = reference(path)
            found[path] = []
            for prompt in PROMPTS:
                ids = torch.tensor([prompt])
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=MAX_TOKENS,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                found[path].append(out[0, len(prompt) :].tolist())
        return found[path]

    return tokens
