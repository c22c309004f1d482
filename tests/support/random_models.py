"""Checkpoints of random bytes, of any config that tightfit knows: made in a moment, without torch.

Bytes need not be sensible numbers where they are only cut and put together again.
"""

import json
import random
from math import prod
from pathlib import Path
from typing import Any

from support.tiny_models import recipe
from tightfit.checkpoint.header import encode_header
from tightfit.model.families import model_spec
from tightfit.model.sources import source_shapes
from tightfit.units import dtype_bytes

_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_TIED_OR_NOT = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "starcoder2", "olmo")
_ALL_KEYS_TOGETHER = ("olmo2", "olmo3", "olmoe")


def write_random_model(
    config: dict[str, Any], directory: Path, *, seed: int, dtype: str = "BF16"
) -> Path:
    """Write the checkpoint that a config promises."""
    shapes = source_shapes(model_spec(config))
    sizes = {name: dtype_bytes(dtype, prod(shape)) for name, shape in shapes.items()}
    header = encode_header([(name, dtype, shapes[name], sizes[name]) for name in shapes])
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    data = random.Random(seed).randbytes(sum(sizes.values()))
    (directory / "model.safetensors").write_bytes(header + data)
    return directory


def variant(name: str, generator: random.Random) -> dict[str, Any]:
    """Other values for a tiny family: eight heads, any KV heads, an odd vocabulary, tied or not."""
    values = recipe(name)
    found: dict[str, Any] = {}
    if not values or "text_config" in values or "short_factor" in values.get("rope_parameters", {}):
        # Their sizes depend on one another.
        return found
    found["vocab_size"] = generator.randrange(259, 700, 2)
    heads = next((key for key in _HEADS if key in values), None)
    if heads is not None:
        found[heads] = 8
    for key in _KV_HEADS:
        if key in values:
            every = heads is not None and values[key] == values[heads]
            few = not every and name not in _ALL_KEYS_TOGETHER
            found[key] = generator.choice((1, 2, 4, 8)) if few else 8
    if name == "helium":
        # transformers gives its output projection the hidden size, whatever the heads are.
        found["head_dim"] = values["hidden_size"] // 8
    if "n_groups" in values:
        found["n_groups"] = 8
    if "linear_num_key_heads" in values:
        found |= {"linear_num_key_heads": 8, "linear_num_value_heads": 16}
    if name.startswith(_TIED_OR_NOT):
        found["tie_word_embeddings"] = generator.random() < 0.5
    return found
