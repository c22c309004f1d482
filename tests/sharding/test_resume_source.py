"""What was made of another model of the same shapes is refused; a copy is the same model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.interrupted import Copied
from support.random_models import write_random_model
from support.work import digests, write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import OutputError
from tightfit.model.stored import stored_layout
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.proof import same_source
from tightfit.sharding.proof.verify import verify
from tightfit.sharding.remote.upload import shard_to
from tightfit.sharding.shard import Sharded, ShardJob, prepare, shard

TinyModel = Callable[[str], Path]
OTHER = "holds the work of another call: the model has other weights"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 96,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_model(LLAMA, tmp_path / "model", seed=1)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Of the same shapes."""
    return write_random_model(LLAMA, tmp_path / "other", seed=2)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """The same bytes, written at another time."""
    found = Path(shutil.copytree(model, tmp_path / "copy"))
    os.utime(found / "model.safetensors", (1, 1))
    return found


@pytest.fixture
def tuned(copy: Path, tmp_path: Path) -> Path:
    """The same but for one bit of one tensor."""
    found = Path(shutil.copytree(copy, tmp_path / "tuned"))
    info = open_checkpoint(str(found)).tensors()["model.layers.1.mlp.down_proj.weight"]
    with open(found / info.file, "r+b") as file:
        file.seek(info.offset + info.nbytes - 1)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 1]))
    return found


def job_of(model: Path, ranks: set[int] | None = None, size: int = 2) -> ShardJob:
    return prepare(
        open_checkpoint(str(model)),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=size,
        max_shard_bytes=10**9,
        ranks=ranks,
    )


def resume(
    model: Path, out: Path, ranks: set[int] | None = None, bars: NoProgress | None = None
) -> Sharded:
    return shard(job_of(model, ranks), out, bars or NoProgress(), resume=True)


def without_states(path: Path) -> None:
    """As an older version has left it."""
    *lines, last = path.read_text().split("\n")
    document = json.loads(last)
    assert document["source"].pop("states").keys() == {"model.safetensors"}
    path.write_text("\n".join([*lines, json.dumps(document)]))


def test_a_finished_directory(
    model: Path, other: Path, copy: Path, tuned: Path, tmp_path: Path
) -> None:
    out, bars = tmp_path / "out", Copied()
    assert shard(job_of(model), out, NoProgress()).fresh
    before = digests(out)
    assert not resume(model, out, bars=bars).fresh
    assert bars.totals == {}
    for another in (other, tuned):
        for ranks in (None, {1}):
            with pytest.raises(OutputError, match=OTHER):
                resume(another, out, ranks)
    # The bit is in the slice of the other rank.
    assert not resume(tuned, out, {0}).fresh
    bars = Copied()
    assert not resume(copy, out, bars=bars).fresh
    assert bars.totals.keys() == {"comparing"}
    # The same file, written anew.
    shutil.copy(other / "model.safetensors", model / "model.safetensors")
    with pytest.raises(OutputError, match=OTHER):
        resume(model, out)
    assert digests(out) == before


def test_a_directory_of_an_older_version(model: Path, other: Path, tmp_path: Path) -> None:
    out, bars = tmp_path / "out", Copied()
    shard(job_of(model), out, NoProgress())
    without_states(out / "tightfit-manifest.json")
    assert not resume(model, out, bars=bars).fresh
    assert bars.totals.keys() == {"comparing"}
    with pytest.raises(OutputError, match=OTHER):
        resume(other, out)


def test_states_are_of_names_in_the_source(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(job_of(model), out, NoProgress())
    text = (out / "tightfit-manifest.json").read_text()
    assert str(tmp_path) not in text
    document = json.loads(text)
    status = (model / "model.safetensors").stat()
    assert document["source"]["states"] == {
        "model.safetensors": [status.st_size, status.st_mtime_ns]
    }
    # A name that leads elsewhere is no proof, and nothing is read there.
    document["source"]["states"] = {"../model/model.safetensors": [1, 1]}
    (out / "tightfit-manifest.json").write_text(json.dumps(document))
    bars = Copied()
    resume(model, out, bars=bars)
    assert bars.totals.keys() == {"comparing"}


def test_a_rank_after_that_of_another_model(model: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(job_of(model, {0}), out, NoProgress())
    before = digests(out)
    for ranks in ({1}, None):
        bars = Copied()
        with pytest.raises(OutputError, match=OTHER):
            resume(other, out, ranks, bars)
        # Refused before anything is copied.
        assert "copying" not in bars.totals
        assert digests(out) == before


def test_a_rank_after_that_of_nearly_the_same_model(
    model: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample shows nothing, and all is compared before there is a manifest."""
    monkeypatch.setattr(same_source, "_SAMPLES", 1)
    out = tmp_path / "out"
    shard(job_of(tuned, {1}), out, NoProgress())
    before = digests(out)
    with pytest.raises(OutputError, match=f"{OTHER}.*down_proj"):
        shard(job_of(model, {0}), out, NoProgress())
    assert digests(out) == before
    with pytest.raises(OutputError, match=f"{OTHER}.*down_proj"):
        resume(model, out, {0})
    assert not (out / "tightfit-manifest.json").exists()


def test_ranks_that_came_together(model: Path, tuned: Path, tmp_path: Path) -> None:
    """Copied from other machines: nothing is written but what vouches for all of them."""
    out = tmp_path / "out"
    for source, rank in ((model, 0), (tuned, 1)):
        shard(job_of(source, {rank}), tmp_path / f"local{rank}", NoProgress())
        shutil.copytree(tmp_path / f"local{rank}", out, dirs_exist_ok=True)
    for ranks in (None, {0}, {1}):
        with pytest.raises(OutputError, match=OTHER):
            resume(model, out, ranks)
        assert not (out / "tightfit-manifest.json").exists()
    # The bit is in the slice of rank 1, so that both ranks are as this one gives them.
    assert not resume(tuned, out).fresh
    write_shards(tuned, tmp_path / "whole", 2)
    weights = {name: one for name, one in digests(out).items() if name.endswith(".safetensors")}
    assert weights.items() <= digests(tmp_path / "whole").items()


@pytest.mark.parametrize("old", [False, True])
def test_ranks_of_copies(old: bool, model: Path, copy: Path, tmp_path: Path) -> None:
    out, bars = tmp_path / "out", Copied()
    shard(job_of(model, {0}), out, NoProgress())
    if old:
        without_states(out / "tightfit-rank-0.json")
    assert resume(copy, out, {1}, bars).manifest.missing_ranks == ()
    assert "comparing" in bars.totals
    checked = verify(
        out, open_checkpoint(str(out)).config, NoProgress(), open_checkpoint(str(model))
    )
    assert checked.ok
    bars = Copied()
    assert not resume(copy, out, bars=bars).fresh
    assert bars.totals == {}


def test_on_a_store(model: Path, other: Path, copy: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    url = "memory://resumed_source"
    try:
        assert shard_to(job_of(model, {0}), url, NoProgress()).fresh
        bars = Copied()
        with pytest.raises(OutputError, match=OTHER):
            shard_to(job_of(other, {1}), url, bars, resume=True)
        assert "uploading" not in bars.totals
        assert shard_to(job_of(copy, {1}), url, NoProgress(), resume=True).fresh
        bars = Copied()
        assert not shard_to(job_of(copy), url, bars, resume=True).fresh
        assert bars.totals == {}
        assert not shard_to(job_of(model), url, bars, resume=True).fresh
        assert bars.totals.keys() == {"comparing"}
        with pytest.raises(OutputError, match=OTHER):
            shard_to(job_of(other), url, NoProgress(), resume=True)
    finally:
        MemoryFileSystem().rm("/resumed_source", recursive=True)


def test_from_rank_files(model: Path, other: Path, copy: Path, tmp_path: Path) -> None:
    """What counts is what they were made of, by whatever cut."""
    shards = {}
    for source in (model, other, copy):
        shards[source] = tmp_path / f"{source.name}-tp4"
        write_shards(source, shards[source], 4)
    out, bars = tmp_path / "out", Copied()
    shard(job_of(shards[model]), out, NoProgress())
    write_shards(model, tmp_path / "straight", 2)
    assert digests(out) == digests(tmp_path / "straight")
    for same in (shards[model], model):
        assert not resume(same, out, bars=bars).fresh
    assert bars.totals == {}
    assert not resume(shards[copy], out, bars=bars).fresh
    assert bars.totals.keys() == {"comparing"}
    for another in (other, shards[other]):
        with pytest.raises(OutputError, match=OTHER):
            resume(another, out)


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "jamba", "qwen3_moe", "llama_tied"])
def test_rank_files_of_all_kinds(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Matrices that are turned, stacked experts, decay rates and what is kept beside the ranks."""
    model, out, bars = tiny_model(name), tmp_path / "out", Copied()
    write_shards(model, tmp_path / "tp4", 4)
    write_shards(model, out, 2)
    without_states(out / "tightfit-manifest.json")
    assert not resume(tmp_path / "tp4", out, bars=bars).fresh
    assert bars.totals.keys() == {"comparing"}
    path = tmp_path / "tp4" / "model-rank-1-part-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    if read_manifest(tmp_path / "tp4").rank_files(1)[0].tensors[-1].pieces:
        with pytest.raises(OutputError, match=OTHER):
            resume(tmp_path / "tp4", out)
