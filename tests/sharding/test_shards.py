"""Rank files hold what an independent slicing of the whole tensors gives."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.slicing import Tensors, expected_rank, read_rank
from support.tiny_models import NAMES, make_tiny_model
from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import CheckpointError, LayoutError
from tightfit.model.stored import stored_layout
from tightfit.sharding.proof.verify import verify
from tightfit.sharding.shard import prepare, shard
from tightfit.sharding.stream import carry, source_files

TinyModel = Callable[[str], Path]


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def check(model: Path, out: Path, size: int, **options: object) -> None:
    write_shards(model, out, size, **options)  # type: ignore[arg-type]
    for rank in range(size):
        assert_equal(read_rank(out, rank), expected_rank(model, rank, size))
    config = open_checkpoint(str(out)).config
    report = verify(out, config, NoProgress(), open_checkpoint(str(model)))
    assert report.problems == ()
    assert report.compared_with_source


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_family(name: str, size: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    # vLLM itself cannot copy KV heads that are normalized together.
    layout = "builtin" if name in ("olmo2", "olmo3") and size == 4 else "vllm-0.32"
    check(tiny_model(name), tmp_path / "out", size, layout=layout)


def test_what_vllm_cannot_load_is_not_made(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(LayoutError) as e:
        write_shards(tiny_model("olmo2"), tmp_path / "out", 4)
    assert e.value.message == (
        "tensor parallel size 4 is more than num_key_value_heads = 2, and vLLM cannot copy KV "
        "heads of Olmo2ForCausalLM, which normalizes all keys together"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [2, 3])
def test_uneven_shares(odd_model: Path, tmp_path: Path, size: int) -> None:
    check(odd_model, tmp_path / "out", size, layout="builtin")


def test_uneven_shares_are_refused_for_vllm(odd_model: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError) as e:
        write_shards(odd_model, tmp_path / "out", 2)
    assert e.value.message == "tensor parallel size 2 does not divide num_attention_heads = 9"
    assert e.value.hint is not None
    assert e.value.hint.endswith("; or --layout builtin, which `tightfit run` loads")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes(dtype: str, tmp_path: Path) -> None:
    model = make_tiny_model("qwen2_tied", tmp_path / "model", dtype=dtype)
    check(model, tmp_path / "out", 2)


@pytest.mark.parametrize("name", ["llama_bias", "qwen3_moe", "phi3"])
def test_many_parts_hold_the_same(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    limit = 100_000
    check(tiny_model(name), tmp_path / "out", 2, max_shard_bytes=limit)
    parts = sorted((tmp_path / "out").glob("model-rank-0-part-*.safetensors"))
    assert len(parts) > 3
    numbers = [int(p.stem.rsplit("-", 1)[1]) for p in parts]
    assert sorted(numbers) == list(range(len(parts)))
    for path in parts:
        sizes = [t.nbytes for t in load_file(path).values()]
        assert sum(sizes) <= limit or len(sizes) == 1


def test_alignment_and_names(tiny_model: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_shards(tiny_model("qwen3_moe"), out, 2)
    for path in out.glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        assert (8 + length) % 4096 == 0
        for name, entry in json.loads(data[8 : 8 + length]).items():
            start, stop = entry["data_offsets"]
            nbytes = stop - start
            assert start % min(nbytes & -nbytes, 4096) == 0, name
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-rank-0-part-0.safetensors",
        "model-rank-1-part-0.safetensors",
        "tightfit-manifest.json",
    ]


def test_modes_follow_the_umask(tiny_model: TinyModel, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_shards(tiny_model("llama"), tmp_path / "out", 1)
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_nan_payloads_are_bytes_like_any_other(tiny_model: TinyModel, tmp_path: Path) -> None:
    """bfloat16 bit patterns 0x7FC1 and 0xFF83 are NaNs that arithmetic would not keep apart."""
    model, tensors = copy_of(tiny_model("llama"), tmp_path / "model")
    pattern = torch.tensor([0x7FC1, -125, 0x7F81, -32768], dtype=torch.int16)
    bits = tensors["model.layers.0.mlp.down_proj.weight"].view(torch.int16)
    bits.copy_(pattern.repeat(bits.numel() // 4).reshape(bits.shape))
    write_model(model, tensors)
    write_shards(model, tmp_path / "out", 2)
    halves = [
        read_rank(tmp_path / "out", rank)["model.layers.0.mlp.down_proj.weight"] for rank in (0, 1)
    ]
    assert torch.equal(torch.cat([half.view(torch.int16) for half in halves], dim=1), bits)
    report = verify(
        tmp_path / "out",
        open_checkpoint(str(model)).config,
        NoProgress(),
        open_checkpoint(str(model)),
    )
    assert report.ok


def test_small_buffers_give_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tiny_model("qwen3_moe"), tmp_path / "one", 4)
    monkeypatch.setattr(carry, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(source_files, "_MOST_BUFFERS", 3)
    write_shards(tiny_model("qwen3_moe"), tmp_path / "other", 4)
    assert_same_files(tmp_path / "one", tmp_path / "other")


def test_remote_source_gives_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    import fsspec

    model = tiny_model("llama_bias")
    remote = fsspec.filesystem("memory")
    for path in model.iterdir():
        remote.pipe_file(f"/models/it/{path.name}", path.read_bytes())
    write_shards(model, tmp_path / "local", 2)
    job = prepare(
        open_checkpoint("memory://models/it"),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=2,
        max_shard_bytes=10**9,
    )
    shard(job, tmp_path / "remote", NoProgress())
    for rank in (0, 1):
        name = f"model-rank-{rank}-part-0.safetensors"
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    local = {p.name for p in (tmp_path / "local").iterdir()}
    assert {p.name for p in (tmp_path / "remote").iterdir()} == local


def test_sources_in_several_files(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, tensors = copy_of(tiny_model("llama"), tmp_path / "model")
    (model / "model.safetensors").unlink()
    halves: list[Tensors] = [{}, {}]
    for i, (name, tensor) in enumerate(tensors.items()):
        halves[i % 2][name] = tensor
    weight_map = {}
    for i, half in enumerate(halves):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file(half, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    check(model, tmp_path / "out", 2)
    assert not list((tmp_path / "out").glob("*.index.json"))


def copy_of(model: Path, directory: Path) -> tuple[Path, Tensors]:
    shutil.copytree(model, directory)
    return directory, load_file(directory / "model.safetensors")


def write_model(directory: Path, tensors: Tensors) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def assert_same_files(one: Path, other: Path) -> None:
    names = {p.name for p in one.iterdir()}
    assert names == {p.name for p in other.iterdir()}
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def problem(model: Path, out: Path, size: int = 2) -> str:
    with pytest.raises(CheckpointError) as e:
        write_shards(model, out, size)
    assert e.value.hint
    assert not out.exists()
    return e.value.message


def test_missing_tensor(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, tensors = copy_of(tiny_model("llama"), tmp_path / "model")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_model(model, tensors)
    assert problem(model, tmp_path / "out") == (
        "model lacks the tensor 'model.layers.1.mlp.up_proj.weight'"
    )


def test_unknown_tensor(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, tensors = copy_of(tiny_model("llama"), tmp_path / "model")
    tensors["extra\x1b[31m"] = torch.ones(2)
    write_model(model, tensors)
    assert "holds the tensor 'extra\\x1b[31m'" in problem(model, tmp_path / "out")


def test_wrong_shape(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, tensors = copy_of(tiny_model("llama"), tmp_path / "model")
    tensors["model.norm.weight"] = torch.ones(127, dtype=torch.bfloat16)
    write_model(model, tensors)
    assert problem(model, tmp_path / "out") == (
        "model: tensor 'model.norm.weight' has the shape [127], and config.json says [128]"
    )


def test_mixed_dtypes(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Whole tensors of another dtype stay so; parts of one tensor cannot."""
    model, tensors = copy_of(tiny_model("llama"), tmp_path / "model")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    write_model(model, tensors)
    check(model, tmp_path / "good", 2)
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors[
        "model.layers.0.self_attn.k_proj.weight"
    ].half()
    write_model(model, tensors)
    assert problem(model, tmp_path / "out") == (
        "the parts of 'model.layers.0.self_attn.qkv_proj.weight' have different dtypes: BF16, F16"
    )


def test_a_different_head_is_untied(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, tensors = copy_of(tiny_model("llama_tied"), tmp_path / "model")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_model(model, tensors)
    check(model, tmp_path / "out", 2)
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["tie_word_embeddings"] is False
    assert "model.embed_tokens.weight" in read_rank(tmp_path / "out", 0)


def test_an_equal_head_stays_tied(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, tensors = copy_of(tiny_model("llama_tied"), tmp_path / "model")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_model(model, tensors)
    write_shards(model, tmp_path / "out", 2)
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["tie_word_embeddings"] is True
    expected = expected_rank(tiny_model("llama_tied"), 1, 2)
    assert_equal(read_rank(tmp_path / "out", 1), expected)


def test_truncated_source(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, _ = copy_of(tiny_model("llama"), tmp_path / "model")
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    assert "it is truncated" in problem(model, tmp_path / "out")


class During(NoProgress):
    """Does something once, after `at` bytes."""

    def __init__(self, action: Callable[[], None], at: int = 0) -> None:
        self.action, self.left = action, at

    def advance(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            self.left = 2**60
            self.action()


@pytest.mark.parametrize("damage", ["touched", "truncated"])
@pytest.mark.parametrize("buffer", [4096, 2**23])
def test_source_changes_meanwhile(
    damage: str,
    buffer: int,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(carry, "BUFFER_BYTES", buffer)
    model, _ = copy_of(tiny_model("llama"), tmp_path / "model")
    path = model / "model.safetensors"
    action = {
        "touched": lambda: os.utime(path, ns=(1, 1)),
        "truncated": lambda: os.truncate(path, 20_000),
    }[damage]
    checkpoint = open_checkpoint(str(model))
    job = prepare(
        checkpoint, stored_layout("vllm-0.32"), tensor_parallel_size=2, max_shard_bytes=10**9
    )
    with pytest.raises(CheckpointError) as e:
        shard(job, tmp_path / "out", During(action))
    changed = f"{model}: 'model.safetensors' changed while it was read"
    ended = "model.safetensors is truncated: byte "
    # Threads may have read all of it before.
    known = (changed,) if damage == "touched" else (changed, ended)
    assert e.value.message.startswith(known)
    assert not (tmp_path / "out").exists()
