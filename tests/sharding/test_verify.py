"""Each kind of damage to a sharded checkpoint is found, and called by its name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import VerificationError
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.proof.verify import check_tensor_parallel_size, verify

TinyModel = Callable[[str], Path]
FIRST, SECOND = "model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"
MANIFEST = "tightfit-manifest.json"


@pytest.fixture(scope="module")
def whole(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards") / "whole"
    write_shards(tiny_model("llama"), directory, 2)
    return directory


@pytest.fixture
def shards(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def problems(directory: Path, against: Path | None = None) -> list[str]:
    config = open_checkpoint(str(directory)).config
    source = None if against is None else open_checkpoint(str(against))
    return list(verify(directory, config, NoProgress(), source).problems)


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def test_whole(shards: Path, tiny_model: TinyModel) -> None:
    config = open_checkpoint(str(shards)).config
    report = verify(shards, config, NoProgress(), None)
    assert report.ok
    assert not report.compared_with_source
    assert report.tensors == sum(len(f.tensors) for f in read_manifest(shards).files)
    assert problems(shards, tiny_model("llama")) == []


def test_every_flipped_byte_is_found(shards: Path) -> None:
    """In the data the tensor is named; in the header its entry, or that it is no header."""
    for file in read_manifest(shards).rank_files(1):
        for tensor in file.tensors[::7]:
            at = tensor.offset + tensor.nbytes - 1
            flip(shards / file.name, at)
            assert problems(shards) == [
                f"{file.name}: {tensor.name!r} is damaged (its checksum differs)"
            ]
            flip(shards / file.name, at)
    assert problems(shards) == []
    header_text = (shards / FIRST).read_bytes()[:4096].rstrip()
    for at in range(0, len(header_text), 97):
        flip(shards / FIRST, at)
        assert problems(shards), at
        flip(shards / FIRST, at)


def test_truncated(shards: Path) -> None:
    size = (shards / FIRST).stat().st_size
    os.truncate(shards / FIRST, size - 1)
    (found,) = problems(shards)
    assert found.startswith(f"{FIRST}: tensor ")
    assert "it is truncated" in found


def test_longer(shards: Path) -> None:
    with open(shards / SECOND, "ab") as file:
        file.write(b"\0")
    (found,) = problems(shards)
    assert found.startswith(f"{SECOND} has ")


def test_missing_part(shards: Path) -> None:
    (shards / SECOND).unlink()
    assert problems(shards) == [f"{SECOND} is missing"]


def test_stray_part(shards: Path) -> None:
    shutil.copy(shards / FIRST, shards / "model-rank-0-part-1.safetensors")
    assert problems(shards) == [
        "model-rank-0-part-1.safetensors is not in the manifest; engines would load it as well"
    ]


def test_swapped_ranks(shards: Path) -> None:
    os.rename(shards / FIRST, shards / "x")
    os.rename(shards / SECOND, shards / FIRST)
    os.rename(shards / "x", shards / SECOND)
    found = problems(shards)
    assert f"{FIRST}: 'lm_head.weight' is damaged (its checksum differs)" in found
    # What is whole on every rank is the same in both files.
    assert not any("norm" in line for line in found)


def test_exchanged_ranks_in_the_manifest(shards: Path) -> None:
    def swap(document: dict[str, Any]) -> None:
        first, second = document["files"]
        first["rank"], second["rank"] = 1, 0

    edit(shards / MANIFEST, swap)
    found = problems(shards)
    assert "rank 1: 'lm_head.weight' holds the slices of another rank or model" in found
    assert not any("norm" in line for line in found)


def test_exchanged_names(shards: Path) -> None:
    """vLLM goes by the names: each rank would load what is the other's."""
    os.rename(shards / FIRST, shards / "x")
    os.rename(shards / SECOND, shards / FIRST)
    os.rename(shards / "x", shards / SECOND)

    def swap(document: dict[str, Any]) -> None:
        first, second = document["files"]
        first["name"], second["name"] = SECOND, FIRST

    edit(shards / MANIFEST, swap)
    assert problems(shards) == [
        f"{SECOND} is listed as a file of rank 0, which has {FIRST}",
        f"{FIRST} is listed as a file of rank 1, which has {SECOND}",
    ]


def test_gap_in_the_parts(shards: Path) -> None:
    third = FIRST.replace("part-0", "part-2")
    os.rename(shards / FIRST, shards / third)
    edit(shards / MANIFEST, lambda d: d["files"][0].update(name=third))
    assert problems(shards) == [f"{third} is listed as a file of rank 0, which has {FIRST}"]


def test_ranks_of_different_checkpoints(shards: Path, tmp_path: Path) -> None:
    """Of the same shapes and names, each rank whole by itself."""
    from support.tiny_models import make_tiny_model

    model = make_tiny_model("llama", tmp_path / "other")
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    weights.write_bytes(data[:length] + bytes(byte ^ 1 for byte in data[length:]))
    write_shards(model, tmp_path / "theirs", 2)
    theirs = json.loads((tmp_path / "theirs" / MANIFEST).read_bytes())
    shutil.copy(tmp_path / "theirs" / SECOND, shards / SECOND)
    edit(shards / MANIFEST, lambda d: d["files"].__setitem__(1, theirs["files"][1]))
    (found,) = problems(shards)
    assert found.startswith("rank 0 and rank 1 hold different 'model.")
    assert found.endswith(" more: they were cut from different checkpoints")


def test_exchanged_slices_in_the_manifest(shards: Path, tiny_model: TinyModel) -> None:
    def swap(document: dict[str, Any]) -> None:
        one, other = (file["tensors"]["lm_head.weight"] for file in document["files"])
        one["pieces"], other["pieces"] = other["pieces"], one["pieces"]

    edit(shards / MANIFEST, swap)
    lies = [
        f"rank {rank}: 'lm_head.weight' holds the slices of another rank or model"
        for rank in (0, 1)
    ]
    assert problems(shards) == lies
    assert problems(shards, tiny_model("llama")) == lies + [
        f"{name}: 'lm_head.weight' differs from {tiny_model('llama').name}"
        for name in (FIRST, SECOND)
    ]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.update(format=2), "its format is not 1"),
        (lambda d: d.pop("format"), "its format is not 1"),
        (lambda d: d.pop("files"), "KeyError: 'files'"),
        (lambda d: d.update(files={}), "ValueError: files of 0 ranks, "),
        (lambda d: d.update(tensor_parallel_size=2**40), "ValueError: files of 2 ranks, "),
        (lambda d: d["files"][1].update(rank=2), "ValueError: files of 2 ranks, "),
        (lambda d: d.update(files=[1]), "TypeError: "),
        (lambda d: d.update(tensor_parallel_size=0), "ValueError: unexpected 0"),
        (lambda d: d.update(tensor_parallel_size="2"), "ValueError: unexpected '2'"),
        (lambda d: d["files"][0].update(nbytes=-1), "ValueError: unexpected -1"),
        (lambda d: d["files"][0].update(name=7), "ValueError: unexpected 7"),
        (lambda d: d.update(source=[]), "TypeError: "),
    ],
)
def test_damaged_manifest(
    shards: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    edit(shards / MANIFEST, change)
    with pytest.raises(VerificationError) as e:
        read_manifest(shards)
    prefix = f"{shards / MANIFEST} is damaged or of another version of tightfit: "
    assert e.value.message.startswith(prefix + complaint)
    assert e.value.hint == "run `tightfit shard` again"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_manifest_that_is_no_manifest(shards: Path, data: bytes) -> None:
    (shards / MANIFEST).write_bytes(data)
    with pytest.raises(VerificationError) as e:
        read_manifest(shards)
    assert "is damaged or of another version" in e.value.message


def test_without_a_manifest(shards: Path) -> None:
    (shards / MANIFEST).unlink()
    with pytest.raises(VerificationError) as e:
        read_manifest(shards)
    assert e.value.message == (
        f"{shards} has no {MANIFEST}: it is not a complete output of `tightfit shard`"
    )


def test_manifest_that_leads_outside(shards: Path) -> None:
    def outside(document: dict[str, Any]) -> None:
        document["files"][0]["name"] = "../whole/" + FIRST

    edit(shards / MANIFEST, outside)
    found = problems(shards)
    assert any("which is not a plain name inside the checkpoint" in line for line in found)


def test_config_of_another_model(shards: Path, tiny_model: TinyModel) -> None:
    def larger(config: dict[str, Any]) -> None:
        config["intermediate_size"] = 512

    edit(shards / "config.json", larger)
    found = problems(shards)
    assert len(found) == 2 * 2 * 2
    assert (
        "rank 0: 'model.layers.0.mlp.down_proj.weight' has the shape [128, 128], and config.json "
        "says [128, 256]"
    ) in found
    shutil.copy(tiny_model("llama_bias") / "config.json", shards / "config.json")
    assert "rank 1 lacks 'model.layers.1.mlp.down_proj.bias'" in problems(shards)
    edit(shards / "config.json", lambda c: c.update(architectures=["UnheardOfForCausalLM"]))
    assert problems(shards) == [
        "config.json does not fit the manifest: architecture UnheardOfForCausalLM is not modelled"
    ]


def test_tied_by_the_config(shards: Path) -> None:
    """Engines would then expect one table instead of two."""
    edit(shards / "config.json", lambda c: c.update(tie_word_embeddings=True))
    unwanted = "has 'model.embed_tokens.weight', which layout vllm-0.32 does not want"
    assert {f"rank 0 {unwanted}", f"rank 1 {unwanted}"} <= set(problems(shards))


def test_against_another_model(shards: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    from support.tiny_models import make_tiny_model

    other = make_tiny_model("llama_tied", tmp_path / "other")
    found = problems(shards, other)
    assert "other lacks 'lm_head.weight', from which 'lm_head.weight' was made" in found
    found = problems(shards, tiny_model("llama3"))
    assert f"{FIRST}: 'model.layers.0.self_attn.qkv_proj.weight' differs from llama3" in found
    float_model = make_tiny_model("llama", tmp_path / "float", dtype="float32")
    found = problems(shards, float_model)
    constants = 4 * 2 * 2
    tensors = sum(len(f.tensors) for f in read_manifest(shards).files)
    assert len(found) == tensors - constants


def test_wrong_tensor_parallel_size(shards: Path) -> None:
    manifest = read_manifest(shards)
    assert check_tensor_parallel_size(manifest, None, "it") == 2
    assert check_tensor_parallel_size(manifest, 2, "it") == 2
    with pytest.raises(VerificationError) as e:
        check_tensor_parallel_size(manifest, 4, "it")
    assert e.value.message == "it was sharded for tensor parallel size 2, not 4"
    assert e.value.hint == "use --tensor-parallel-size 2, or shard the model again for 4"


def test_manifest_says_what_the_source_was(shards: Path, tiny_model: TinyModel) -> None:
    manifest = read_manifest(shards)
    assert manifest.source_name == tiny_model("llama").name
    assert manifest.layout == "vllm-0.32"
    assert manifest.architecture == "LlamaForCausalLM"
    assert (manifest.tensor_parallel_size, manifest.pipeline_parallel_size) == (2, 1)
    assert [file.rank for file in manifest.files] == [0, 1]
    assert all((shards / f.name).stat().st_size == f.nbytes for f in manifest.files)
