"""Llama checkpoints of any size, without torch: random bytes, or holes."""

import json
import random
from pathlib import Path
from typing import Any

from tightfit.checkpoint.header import encode_header
from tightfit.model.families import model_spec
from tightfit.model.sources import source_shapes
from tightfit.units import dtype_bytes


def make_random_llama(
    directory: Path, *, hidden: int, layers: int, vocab: int, sparse: bool = False, **more: Any
) -> Path:
    """One file in bfloat16; `sparse` leaves holes where random bytes would be."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **more,
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    shapes = source_shapes(model_spec(config))
    sizes = {}
    for name, shape in shapes.items():
        elements = 1
        for extent in shape:
            elements *= extent
        sizes[name] = dtype_bytes("BF16", elements)
    header = encode_header([(n, "BF16", tuple(shapes[n]), sizes[n]) for n in shapes])
    path, generator = directory / "model.safetensors", random.Random(3)
    with open(path, "wb") as file:
        file.write(header)
        if sparse:
            file.truncate(len(header) + sum(sizes.values()))
        else:
            for size in sizes.values():
                file.write(generator.randbytes(size))
    return directory
