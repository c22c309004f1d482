"""What is in a directory counts only if it is of the same job, and of the same model."""

import json
import os
import shutil
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


def job_of(model: Path, ranks: set[int] | None = None, shard_bytes: int = 10**9) -> ShardJob:
    return prepare(
        open_checkpoint(str(model)),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=2,
        max_shard_bytes=shard_bytes,
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
    with pytest.raises(OutputError, match="another call: config"):
        shard(job_of(model), out, NoProgress(), resume=True)
    assert digests(out) == before


def test_another_config_on_a_store(tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    model, url = make(tmp_path / "model", BLOOM), "memory://another_config"
    try:
        shard_to(job_of(model, {0}), url, NoProgress())
        (model / "config.json").write_text(json.dumps({**BLOOM, "n_head": 8}))
        with pytest.raises(OutputError, match="another call: config"):
            shard_to(job_of(model), url, NoProgress(), resume=True)
    finally:
        MemoryFileSystem().rm("/another_config", recursive=True)


def test_ranks_of_two_models(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one", LLAMA), make(tmp_path / "other", LLAMA, seed=2)
    out = tmp_path / "out"
    shard(job_of(one, {0}), out, NoProgress())
    before = digests(out)
    for ranks in ({1}, None):
        with pytest.raises(OutputError, match="another call: the model has other weights"):
            shard(job_of(other, ranks), out, NoProgress(), resume=ranks is None)
        if ranks is not None:
            assert digests(out) == before
    assert not (out / "tightfit-manifest.json").exists()


def test_ranks_of_two_models_on_a_store(tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    one, other = make(tmp_path / "one", LLAMA), make(tmp_path / "other", LLAMA, seed=2)
    url = "memory://two_models"
    try:
        shard_to(job_of(one, {0}), url, NoProgress())
        with pytest.raises(OutputError, match="another call: the model has other weights"):
            shard_to(job_of(other, {1}), url, NoProgress())
        assert not MemoryFileSystem().exists("/two_models/tightfit-manifest.json")
    finally:
        MemoryFileSystem().rm("/two_models", recursive=True)


def test_nothing_vouches_for_a_rank_that_is_rewritten(tmp_path: Path) -> None:
    model, out = make(tmp_path / "model", LLAMA), tmp_path / "out"
    shard(job_of(model), tmp_path / "whole", NoProgress())
    shard(job_of(model, {0}), out, NoProgress())
    os.truncate(out / "model-rank-0-part-0.safetensors", 5000)
    with pytest.raises(KeyboardInterrupt):
        shard(job_of(model, {0}), out, Stop(), resume=True)
    assert not (out / "tightfit-rank-0.json").exists()
    assert shard(job_of(model, {1}), out, NoProgress()).manifest.missing_ranks == (0,)
    shard(job_of(model, {0}), out, NoProgress(), resume=True)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_rank_that_lost_its_file_has_not_come(tmp_path: Path) -> None:
    model, out = make(tmp_path / "model", LLAMA), tmp_path / "out"
    shard(job_of(model, {0}), out, NoProgress())
    os.truncate(out / "model-rank-0-part-0.safetensors", 5000)
    assert shard(job_of(model, {1}), out, NoProgress()).manifest.missing_ranks == (0,)


def test_another_job_comes_meanwhile(tmp_path: Path) -> None:
    model, out = make(tmp_path / "model", LLAMA), tmp_path / "out"

    class Meanwhile(NoProgress):
        def phase(self, name: str, total_bytes: int) -> None:
            shutil.copytree(tmp_path / "elsewhere", out, dirs_exist_ok=True)

    shard(job_of(model, {1}, 10**6), tmp_path / "elsewhere", NoProgress())
    with pytest.raises(OutputError, match="--max-shard-size was 1,000,000, and is 1,000,000,000"):
        shard(job_of(model, {0}), out, Meanwhile())
    assert not (out / "tightfit-manifest.json").exists()


def test_a_damaged_rank_manifest(tmp_path: Path) -> None:
    model, out = make(tmp_path / "model", LLAMA), tmp_path / "out"
    shard(job_of(model), tmp_path / "whole", NoProgress())
    shard(job_of(model, {0}), out, NoProgress())
    path = out / "tightfit-rank-0.json"
    first, second = path.read_text().split("\n")
    path.write_text(f"{first}\n{second.replace('model.norm', 'model.gnome')}")
    shard(job_of(model), out, NoProgress(), resume=True)
    assert digests(out) == digests(tmp_path / "whole")
