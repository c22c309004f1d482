"""Rank files give the checkpoint back, and files for any other size, byte for byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.tiny_families import SHARDED
from support.tiny_media import MEDIA
from support.tiny_models import RECIPES
from support.work import digests, merged, stored, write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import (
    CheckpointError,
    LayoutError,
    TightfitError,
    VerificationError,
)
from tightfit.sharding.manifest import ORIGINALS
from tightfit.sharding.proof.verify import verify
from tightfit.sharding.stream import carry, source_files

TinyModel = Callable[[str], Path]
LAYOUTS = {"vllm-0.32": (1, 2, 4), "builtin": (3,)}
NOT_BY_FOUR = {
    "olmo2": "normalizes all keys together, of two heads",
    "olmo3": "normalizes all keys together, of two heads",
    "olmoe": "normalizes all keys together, of two heads",
    "mamba2": "has two groups",
    "qwen3_next": "has two linear heads",
}
"""What else is cut for 1, 2 and 4 ranks; for 3, only some families can be."""


@pytest.mark.parametrize("name", [*RECIPES, *SHARDED])
def test_there_and_back(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(name)
    source = stored(model)
    sizes = [(size, layout) for layout, some in LAYOUTS.items() for size in some]
    done = []
    for size, layout in sizes:
        shards = tmp_path / f"tp{size}"
        try:
            write_shards(model, shards, size, layout=layout)
        except LayoutError:
            # Towers have two heads.
            assert size == 3 or (size == 4 and (name in NOT_BY_FOUR or name in MEDIA))
            assert not shards.exists()
            continue
        assert merged(shards, tmp_path / f"back{size}") == source
        done.append((size, layout))
    # From every size to every other, without the source.
    for size, layout in done:
        for before, _ in done:
            if size != before:
                again = tmp_path / f"from{before}to{size}"
                write_shards(tmp_path / f"tp{before}", again, size, layout=layout)
                assert digests(again) == digests(tmp_path / f"tp{size}")


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe", "gemma3"])
def test_pipeline_stages(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(name)
    write_shards(model, tmp_path / "two", 2, pipeline_parallel_size=2)
    assert merged(tmp_path / "two", tmp_path / "back") == stored(model)
    write_shards(tmp_path / "two", tmp_path / "one", 2)
    write_shards(model, tmp_path / "direct", 2)
    assert digests(tmp_path / "one") == digests(tmp_path / "direct")


@pytest.mark.parametrize("size", [2, 3])
def test_uneven_shares(odd_model: Path, tmp_path: Path, size: int) -> None:
    write_shards(odd_model, tmp_path / "out", size, layout="builtin")
    assert merged(tmp_path / "out", tmp_path / "back") == stored(odd_model)
    write_shards(tmp_path / "out", tmp_path / "again", 5 - size, layout="builtin")
    write_shards(odd_model, tmp_path / "direct", 5 - size, layout="builtin")
    assert digests(tmp_path / "again") == digests(tmp_path / "direct")


def test_small_buffers(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tiny_model("mixtral"), tmp_path / "out", 4)
    monkeypatch.setattr(source_files, "_MOST_BUFFERS", 3)
    for nbytes in (1000, 100, 10):
        monkeypatch.setattr(carry, "BUFFER_BYTES", nbytes)
        back = tmp_path / f"back-{nbytes}"
        assert merged(tmp_path / "out", back) == stored(tiny_model("mixtral"))


def test_what_is_written(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Files as transformers writes them, which it loads."""
    import transformers as T

    model = tiny_model("llama")
    (tmp_path / "model").mkdir()
    for path in model.iterdir():
        shutil.copy(path, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    write_shards(tmp_path / "model", tmp_path / "out", 2)
    merged(tmp_path / "out", tmp_path / "one")
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        p.name for p in (tmp_path / "model").iterdir()
    }
    found = merged(tmp_path / "out", tmp_path / "many", 10**5)
    assert found == stored(model)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_bytes())
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in found.values())
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype="auto")
    whole = T.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_what_engines_do_not_load_comes_back(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("llama_tied"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    write_shards(model, tmp_path / "out", 2)
    assert (tmp_path / "out" / ORIGINALS).exists()
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    report = verify(tmp_path / "out", checkpoint.config, NoProgress(), open_checkpoint(str(model)))
    assert report.problems == ()
    assert merged(tmp_path / "out", tmp_path / "back") == stored(model)
    write_shards(tmp_path / "out", tmp_path / "one", 1)
    write_shards(model, tmp_path / "direct", 1)
    assert digests(tmp_path / "one") == digests(tmp_path / "direct")


def test_without_a_manifest(tiny_model: TinyModel, tmp_path: Path) -> None:
    """As vLLM's own script leaves a directory, parts and all."""
    for name, size in (("llama_mqa", 4), ("qwen3_moe", 2), ("gemma2", 2), ("phi3", 1)):
        shards = tmp_path / name
        write_shards(tiny_model(name), shards, size, max_shard_bytes=10**5)
        (shards / "tightfit-manifest.json").unlink()
        assert merged(shards, tmp_path / f"{name}-back") == stored(tiny_model(name))
        write_shards(shards, tmp_path / f"{name}-one", 1)
        report = verify(
            tmp_path / f"{name}-one",
            open_checkpoint(str(shards)).config,
            NoProgress(),
            open_checkpoint(str(tiny_model(name))),
        )
        assert report.problems == ()


def test_without_a_manifest_nothing_is_guessed(tiny_model: TinyModel, tmp_path: Path) -> None:
    shards = tmp_path / "out"
    write_shards(tiny_model("llama"), shards, 2)
    (shards / "tightfit-manifest.json").unlink()
    config = json.loads((shards / "config.json").read_bytes())
    other = config | {"intermediate_size": 512}
    (shards / "config.json").write_text(json.dumps(other))
    with pytest.raises(LayoutError) as e:
        merged(shards, tmp_path / "back")
    assert "has the shape [256, 128], and config.json says [512, 128]" in e.value.message
    (shards / "config.json").write_text(json.dumps(config))
    (shards / "model-rank-0-part-0.safetensors").unlink()
    with pytest.raises(CheckpointError) as e2:
        merged(shards, tmp_path / "back")
    assert e2.value.message == "out lacks the files of rank 0"
    assert not (tmp_path / "back").exists()


def test_copies_that_differ(tiny_model: TinyModel, tmp_path: Path) -> None:
    shards = tmp_path / "out"
    write_shards(tiny_model("llama_mqa"), shards, 2)
    (shards / "tightfit-manifest.json").unlink()
    for name, source in (
        ("model.norm.weight", "model.norm.weight"),
        (
            "model.layers.0.self_attn.qkv_proj.weight",
            "model.layers.0.self_attn.v_proj.weight",
        ),
    ):
        path = shards / "model-rank-1-part-0.safetensors"
        data = path.read_bytes()
        tensors = load_file(path)
        tensors[name][-1] += 1
        save_file(tensors, path)
        with pytest.raises(VerificationError) as e:
            merged(shards, tmp_path / "back")
        assert e.value.message == (
            "model-rank-0-part-0.safetensors and model-rank-1-part-0.safetensors hold different "
            f"copies of {source!r}"
        )
        path.write_bytes(data)
        assert not (tmp_path / "back").exists()


def test_damage_is_found_first(tiny_model: TinyModel, tmp_path: Path) -> None:
    shards = tmp_path / "out"
    write_shards(tiny_model("llama"), shards, 2)
    path = shards / "model-rank-1-part-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for work in (
        lambda: merged(shards, tmp_path / "back"),
        lambda: write_shards(shards, tmp_path / "back", 1),
    ):
        with pytest.raises(VerificationError) as e:
            work()
        assert "is damaged (its checksum differs)" in e.value.message
        assert not (tmp_path / "back").exists()


def test_boxes_that_lead_outside(tiny_model: TinyModel, tmp_path: Path) -> None:
    shards = tmp_path / "out"
    write_shards(tiny_model("llama"), shards, 2)
    path = shards / "tightfit-manifest.json"
    whole = path.read_text()
    for place, value in ((1, [10**9, 128]), (2, [10**9, 0]), (3, [999, 128]), (4, [999, 0])):
        document = json.loads(whole)
        piece = document["files"][0]["tensors"]["lm_head.weight"]["pieces"][0]
        piece[place] = value
        path.write_text(json.dumps(document))
        with pytest.raises(TightfitError):
            merged(shards, tmp_path / "back")
        assert not (tmp_path / "back").exists()


def test_only_sharded_ones(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as e:
        merged(tiny_model("llama"), tmp_path / "back")
    assert e.value.message == "llama is not sharded: there is nothing to merge"
