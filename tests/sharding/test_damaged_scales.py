"""Cache scales that are not one number: nothing of them is cut off, or read past their end."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.header import encode_header
from tightfit.cli.output import NoProgress
from tightfit.errors import CheckpointError
from tightfit.model.families import model_spec
from tightfit.model.sources import expected_sources
from tightfit.sharding.proof.verify import verify
from tightfit.units import dtype_bytes

SCALE = "model.layers.0.self_attn.k_scale"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}


def make(directory: Path, shape: tuple[int, ...]) -> Path:
    """An fp8 model with a scale of that shape."""
    directory.mkdir()
    expected = expected_sources(model_spec(CONFIG))
    entries = [
        (name, one.dtype or "BF16", one.shape, dtype_bytes(one.dtype or "BF16", prod(one.shape)))
        for name, one in expected.items()
    ]
    entries.insert(1, (SCALE, "F32", shape, 4 * prod(shape)))
    data = bytes(i % 64 for i in range(sum(entry[3] for entry in entries)))
    (directory / "model.safetensors").write_bytes(encode_header(entries) + data)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.mark.parametrize("shape", [(2,), (2, 2), (0,)])
def test_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    model = make(tmp_path / "model", shape)
    with pytest.raises(CheckpointError) as e:
        write_shards(model, tmp_path / "out", 2)
    assert e.value.message.startswith(f"{SCALE!r} has the shape {list(shape)}, and ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number(shape: tuple[int, ...], tmp_path: Path) -> None:
    model = make(tmp_path / "model", shape)
    write_shards(model, tmp_path / "out", 2)
    config = open_checkpoint(str(tmp_path / "out")).config
    against = open_checkpoint(str(model))
    assert not verify(tmp_path / "out", config, NoProgress(), against).problems


def test_compared_with_another_shape(tmp_path: Path) -> None:
    """The same first number, and one more behind it."""
    write_shards(make(tmp_path / "model", (1,)), tmp_path / "out", 2)
    other = open_checkpoint(str(make(tmp_path / "other", (2,))))
    config = open_checkpoint(str(tmp_path / "out")).config
    found = verify(tmp_path / "out", config, NoProgress(), other).problems
    assert any("k_scale" in line and "differs from other" in line for line in found)
