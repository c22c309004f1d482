"""What vLLM takes in silence, or refuses with a bare key, gets an answer of its own.

The cases are those that were tried with vLLM's own loader. It knows no tensor parallel size, no
shape and no dtype: a checkpoint for four ranks loads on two, and talks nonsense.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.cli import assert_error, tightfit
from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import TightfitError, VerificationError
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.merge import prepare_merge
from tightfit.sharding.proof.headers import require_headers
from tightfit.sharding.proof.verify import verify

TinyModel = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]
RANK = "model-rank-1-part-0.safetensors"
MANIFEST = "tightfit-manifest.json"
SCALE = "model.layers.0.self_attn.attn._k_scale"


@pytest.fixture(scope="module")
def made(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("faults")

    def make(name: str, size: int) -> Path:
        out = root / f"{name}-tp{size}"
        if not out.exists():
            write_shards(tiny_model(name), out, size)
        return out

    return make


@pytest.fixture
def shards(made: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("llama", 2), tmp_path / "shards"))


def problems(directory: Path) -> list[str]:
    config = open_checkpoint(str(directory)).config
    return list(verify(directory, config, NoProgress(), None).problems)


def edit(directory: Path, change: Callable[[Tensors], None]) -> None:
    """Write a rank's file again, as any tool does."""
    tensors = load_file(directory / RANK)
    change(tensors)
    save_file(tensors, directory / RANK)


def assert_found(directory: Path, *expected: str) -> None:
    """`verify` finds these, and `run` and `merge` begin nothing."""
    found = problems(directory)
    for line in expected:
        assert line in found
    with pytest.raises(VerificationError) as e:
        require_headers(directory, read_manifest(directory))
    assert e.value.message.startswith(f"{directory}: ")
    with pytest.raises(TightfitError):
        prepare_merge(open_checkpoint(str(directory)), max_shard_bytes=10**9)


@pytest.mark.parametrize(("size", "asked"), [(4, 2), (2, 1), (1, 2)])
def test_another_size(size: int, asked: int, made: Callable[..., Path]) -> None:
    directory = made("llama", size)
    message = f"{directory} was sharded for tensor parallel size {size}, not {asked}"
    for command in (["verify"], ["run", "-p", "x"]):
        done = tightfit(command[0], directory, "-tp", str(asked), *command[1:])
        assert_error(done, 1, message)
        hint = f"use --tensor-parallel-size {size}, or shard the model again for {asked}"
        assert hint in done.stderr


def test_ranks_of_another_size(made: Callable[..., Path], tmp_path: Path) -> None:
    """Two of four files look to vLLM like all of two."""
    out = Path(shutil.copytree(made("llama", 4), tmp_path / "out"))
    for rank in (2, 3):
        (out / f"model-rank-{rank}-part-0.safetensors").unlink()
    assert_found(out, *(f"model-rank-{rank}-part-0.safetensors is missing" for rank in (2, 3)))
    # Without the manifest only shapes tell, and the config.
    (out / MANIFEST).unlink()
    with pytest.raises(TightfitError) as e:
        prepare_merge(open_checkpoint(str(out)), max_shard_bytes=10**9)
    assert "has the shape" in e.value.message


def test_an_unknown_key(shards: Path) -> None:
    edit(shards, lambda tensors: tensors.update(foo=torch.zeros(3)))
    assert_found(shards, f"{RANK} has 'foo', which the manifest does not know")
    done = tightfit("run", shards, "-p", "x")
    assert_error(done, 1, f"{shards}: {RANK} has 'foo', which the manifest does not know")


def test_constants_that_are_missing(shards: Path) -> None:
    edit(shards, lambda tensors: tensors.pop(SCALE))
    assert_found(shards, f"{RANK} lacks {SCALE!r}, which the manifest says is there")


def test_a_part_that_was_left(shards: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(128)}, shards / "model-rank-0-part-7.safetensors")
    assert_found(
        shards,
        "model-rank-0-part-7.safetensors is not in the manifest; engines would load it as well",
    )


def test_both_names_of_a_tied_table(made: Callable[..., Path], tmp_path: Path) -> None:
    shards = Path(shutil.copytree(made("llama_tied", 2), tmp_path / "shards"))
    embedding = "model.embed_tokens.weight"

    def both(tensors: Tensors) -> None:
        tensors[embedding] = tensors["lm_head.weight"].clone()

    edit(shards, both)
    assert_found(shards, f"{RANK} has {embedding!r}, which the manifest does not know")

    def other(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]

    edit(shards, other)
    assert_found(shards, f"{RANK} lacks 'lm_head.weight', which the manifest says is there")


def test_another_dtype(shards: Path) -> None:
    def widen(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].float()

    edit(shards, widen)
    assert_found(shards, f"{RANK}: 'lm_head.weight' is F32, and the manifest says BF16")


def test_a_vocabulary_without_padding(shards: Path) -> None:
    def cut(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:99].clone()

    edit(shards, cut)
    assert_found(
        shards,
        f"{RANK}: 'lm_head.weight' has the shape [99, 128], and the manifest says [160, 128]",
    )


def test_a_header_with_padding(shards: Path) -> None:
    """The same tensors at other places: no engine minds, but no checksum holds either."""
    data = (shards / RANK).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size] + b" " * 4096
    (shards / RANK).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    (found,) = problems(shards)
    assert found.startswith(f"{RANK}: ")
    assert found.endswith(
        "are not where the manifest says: something else has written the file anew, which engines "
        "would load all the same"
    )
    assert_found(shards, found)


def test_a_manifest_that_agrees_with_wrong_files(shards: Path) -> None:
    """Whoever writes both is held against the layout."""
    document = json.loads((shards / MANIFEST).read_bytes())
    for file in document["files"]:
        tensors = load_file(shards / file["name"])
        tensors.pop(SCALE)
        save_file(tensors, shards / file["name"])
    for file in document["files"]:
        file["tensors"].pop(SCALE)
    (shards / MANIFEST).write_text(json.dumps(document))
    found = problems(shards)
    assert {f"rank {rank} lacks {SCALE!r}" for rank in (0, 1)} <= set(found)
