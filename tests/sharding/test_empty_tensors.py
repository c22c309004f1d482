"""Tensors without elements, which all writers keep and none divides by."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support.spreading import InProcess
from support.work import digests, merged, stored, write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.model.stored import DEFAULT_LAYOUT, stored_layout
from tightfit.sharding.proof.verify import verify
from tightfit.sharding.remote.upload import shard_to
from tightfit.sharding.shard import ShardJob, prepare, shard

TinyModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    whole, directory = tiny_model("llama"), tmp_path_factory.mktemp("empty")
    tensors = load_file(whole / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(0)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_bytes((whole / "config.json").read_bytes())
    return directory


def job(model: Path) -> ShardJob:
    checkpoint = open_checkpoint(str(model))
    layout = stored_layout(DEFAULT_LAYOUT)
    return prepare(checkpoint, layout, tensor_parallel_size=2, max_shard_bytes=10**9)


def test_every_writer(model: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write_shards(model, one, 2)
    shard(job(model), other, NoProgress(), executor=InProcess())
    shard_to(job(model), "memory://empty-tensors", NoProgress())
    assert digests(one).keys() == digests(other).keys()
    for directory in (str(one), str(other), "memory://empty-tensors"):
        checkpoint = open_checkpoint(directory)
        against = open_checkpoint(str(model))
        assert not verify(checkpoint.source, checkpoint.config, NoProgress(), against).problems
    assert merged(one, tmp_path / "back") == stored(model)
