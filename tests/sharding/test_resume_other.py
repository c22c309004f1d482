"""What is in a directory counts only if it is of the same job, and of the same model."""

import json
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import pytest

from support.work import digests
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.header import encode_header
from tightfit.cli.output import NoProgress
from tightfit.errors import OutputError
from tightfit.model.families import model_spec
from tightfit.model.sources import expected_sources
from tightfit.model.stored import stored_layout
from tightfit.sharding.remote.upload import shard_to
from tightfit.sharding.shard import ShardJob, prepare, shard

BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "hidden_size": 64,
    "n_layer": 1,
    "n_head": 4,
    "vocab_size": 96,
    "torch_dtype": "bfloat16",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 96,
    "torch_dtype": "bfloat16",
}


def make(directory: Path, config: dict[str, Any], seed: int = 1) -> Path:
    directory.mkdir()
    sources = expected_sources(model_spec(config))
    entries = [(n, "BF16", one.shape, 2 * prod(one.shape)) for n, one in sources.items()]
    generator = Random(seed)
    data = b"".join(generator.randbytes(entry[3]) for entry in entries)
    (directory / "model.safetensors").write_bytes(encode_header(entries) + data)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def job_of(model: Path, ranks: set[int] | None = None) -> ShardJob:
    return prepare(
        open_checkpoint(str(model)),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=2,
        max_shard_bytes=10**9,
        ranks=ranks,
    )


class Stop(NoProgress):
    """Ctrl-C once everything is copied."""

    left = 2.0**60

    def phase(self, name: str, total_bytes: int) -> None:
        self.left = total_bytes if name == "copying" else 2.0**60

    def advance(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left <= 0:
            raise KeyboardInterrupt


def test_another_config_cuts_anew(tmp_path: Path) -> None:
    model, out = make(tmp_path / "model", BLOOM), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        shard(job_of(model), out, Stop(), resume=True)
    before = digests(out)
    (model / "config.json").write_text(json.dumps({**BLOOM, "n_head": 8}))
    with pytest.raises(OutputError, match="ranks of another job: its cut_fingerprint is"):
        shard(job_of(model), out, NoProgress(), resume=True)
    assert digests(out) == before


def test_another_config_on_a_store(tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    model, url = make(tmp_path / "model", BLOOM), "memory://another_config"
    try:
        shard_to(job_of(model, {0}), url, NoProgress())
        (model / "config.json").write_text(json.dumps({**BLOOM, "n_head": 8}))
        with pytest.raises(OutputError, match="ranks of another job: its cut_fingerprint is"):
            shard_to(job_of(model), url, NoProgress(), resume=True)
    finally:
        MemoryFileSystem().rm("/another_config", recursive=True)
