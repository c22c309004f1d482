import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.errors import CheckpointError, ConfigError, UsageError

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}
INDEX = "model.safetensors.index.json"


def weights(*names: str) -> bytes:
    return save({name: np.arange(4, dtype=np.float32) for name in names})


def make(directory: Path, **files: bytes | str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in {"config.json": json.dumps(CONFIG), **files}.items():
        (directory / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return directory


def index(**weight_map: str) -> str:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})


def test_a_single_file(tmp_path):
    make(tmp_path / "m", **{"model.safetensors": weights("a", "b")})
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    assert checkpoint.name == "m"
    assert checkpoint.config == CONFIG
    assert checkpoint.files == ("model.safetensors",)
    assert checkpoint.has_weights
    assert not checkpoint.is_sharded
    info = checkpoint.tensors()["b"]
    assert (info.dtype, info.shape, info.file) == ("F32", (4,), "model.safetensors")
    path = checkpoint.source.local_path(info.file)
    data = path.read_bytes()[info.offset : info.offset + info.nbytes]
    assert data == np.arange(4, dtype=np.float32).tobytes()


def test_headers_are_read_once(tmp_path):
    make(tmp_path, **{"model.safetensors": weights("a")})
    checkpoint = open_checkpoint(str(tmp_path))
    first = checkpoint.tensors()
    (tmp_path / "model.safetensors").unlink()
    assert checkpoint.tensors() is first


def test_only_the_tensors_of_the_index_count(tmp_path):
    make(
        tmp_path,
        **{
            INDEX: index(a="1.safetensors", b="sub/2.safetensors"),
            "1.safetensors": weights("a", "extra"),
            "unused.safetensors": weights("a", "z"),
            "model.safetensors": weights("a", "y"),
        },
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "2.safetensors").write_bytes(weights("a", "b"))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.files == ("1.safetensors", "sub/2.safetensors")
    assert {n: i.file for n, i in checkpoint.tensors().items()} == {
        "a": "1.safetensors",
        "b": "sub/2.safetensors",
    }


def test_an_index_without_any_of_its_files_is_no_weights(tmp_path):
    make(tmp_path, **{INDEX: index(a="1.safetensors"), "tokenizer.json": "{}"})
    checkpoint = open_checkpoint(str(tmp_path))
    assert not checkpoint.has_weights
    assert checkpoint.tensors() == {}


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["x.safetensors", "y.safetensors"], ["x.safetensors", "y.safetensors"]),
        (["adapter_model.safetensors", "x.safetensors"], ["x.safetensors"]),
        (["consolidated.safetensors", "x.safetensors"], ["x.safetensors"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["adapter_model.safetensors"], []),
        (["model.safetensors", "x.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "model-rank-0-part-0.safetensors"], ["model.safetensors"]),
    ],
)
def test_which_weight_files(tmp_path, present, chosen):
    make(tmp_path, **{name: weights(name) for name in present})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.files == tuple(chosen)
    assert checkpoint.has_weights == bool(chosen)
    assert len(checkpoint.tensors()) == len(chosen)


@pytest.mark.parametrize(
    "files",
    [
        ["model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"],
        ["model-pp-0-rank-0-part-0.safetensors"],
        ["tightfit-manifest.json", "x.safetensors"],
    ],
)
def test_sharded_checkpoints(tmp_path, files):
    make(tmp_path, **{name: weights("a") for name in files})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.is_sharded
    assert checkpoint.files == ()
    assert not checkpoint.has_weights
    assert checkpoint.config == CONFIG


def test_other_formats_are_named(tmp_path):
    names = ["pytorch_model.bin", "m.Q4_K_M.gguf", "x.pt"]
    make(tmp_path, **dict.fromkeys([*names, "training_args.bin", "optimizer.pt"], b""))
    checkpoint = open_checkpoint(str(tmp_path))
    assert not checkpoint.has_weights
    assert checkpoint.unusable_weights == tuple(sorted(names))
    (tmp_path / "model.safetensors").write_bytes(weights("a"))
    assert open_checkpoint(str(tmp_path)).unusable_weights == ()


def test_a_config_file_stands_for_its_directory(tmp_path):
    make(tmp_path / "m", **{"model.safetensors": weights("a")})
    path = tmp_path / "m" / "config.json"
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.name == "m"
    assert list(checkpoint.tensors()) == ["a"]
    path.rename(tmp_path / "m" / "llama.json")
    checkpoint = open_checkpoint(str(tmp_path / "m" / "llama.json"))
    assert (checkpoint.name, checkpoint.config, checkpoint.files) == ("llama", CONFIG, ())


def test_relative_and_home_paths(tmp_path, monkeypatch):
    make(tmp_path / "m")
    monkeypatch.chdir(tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint(".").name == "m"
    assert open_checkpoint("config.json").name == "m"
    assert open_checkpoint("~/m").config == CONFIG
    assert open_checkpoint(f"file://{tmp_path}/m").config == CONFIG


def cached(root: Path) -> Path:
    repo = root / "models--org--some--name"
    for commit in ("c1", "c2"):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        for name, data in {"config.json": commit.encode(), "w": weights(commit)}.items():
            blob = repo / "blobs" / f"{commit}-{name}"
            blob.write_bytes(json.dumps({"c": commit}).encode() if name != "w" else data)
            link = "model.safetensors" if name == "w" else name
            (snapshot / link).symlink_to(os.path.relpath(blob, snapshot))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c2")
    (repo / "refs" / "v1").write_text("c1")
    return repo


def test_hugging_face_cache_directories(tmp_path):
    repo = cached(tmp_path)
    checkpoint = open_checkpoint(str(repo))
    assert checkpoint.name == "org/some--name"
    assert checkpoint.config == {"c": "c2"}
    assert list(checkpoint.tensors()) == ["c2"]
    assert open_checkpoint(str(repo), revision="v1").config == {"c": "c1"}
    assert open_checkpoint(str(repo), revision="c1").config == {"c": "c1"}
    snapshot = open_checkpoint(str(repo / "snapshots" / "c1"))
    assert (snapshot.name, snapshot.config) == ("org/some--name", {"c": "c1"})
    assert list(snapshot.tensors()) == ["c1"]
    with pytest.raises(ConfigError, match=r"no snapshot of revision 'v9'") as e:
        open_checkpoint(str(repo), revision="v9")
    assert "c1, c2" in e.value.hint
    with pytest.raises(ConfigError, match="no snapshot of revision"):
        open_checkpoint(str(repo), revision="../snapshots/c1")


def test_fsspec_urls():
    from fsspec.implementations.memory import MemoryFileSystem

    fs = MemoryFileSystem()
    names = [f"{i}.safetensors" for i in range(3)]
    fs.pipe({f"/mm/{name}": weights(name) for name in names})
    fs.pipe("/mm/config.json", json.dumps(CONFIG).encode())
    fs.pipe(f"/mm/{INDEX}", index(**{name: name for name in names}).encode())
    for url in ("memory://mm", "memory://mm/", "memory://mm/config.json"):
        checkpoint = open_checkpoint(url)
        assert checkpoint.name == "memory://mm"
        assert checkpoint.config == CONFIG
        assert sorted(checkpoint.tensors()) == names
        assert checkpoint.source.local_path(names[0]) is None
    with pytest.raises(ConfigError, match=r"memory://none has no config\.json"):
        open_checkpoint("memory://none")
    fs.rm("/mm", recursive=True)


def test_large_remote_headers_need_a_second_read():
    from fsspec.implementations.memory import MemoryFileSystem

    fs = MemoryFileSystem()
    names = [f"model.layers.{i}.{'x' * 100}" for i in range(1000)]
    fs.pipe({"/big/config.json": b"{}", "/big/model.safetensors": weights(*names)})
    assert sorted(open_checkpoint("memory://big").tensors()) == sorted(names)
    fs.rm("/big", recursive=True)


@pytest.mark.parametrize(
    "model", ["./none", "/none/there", "none.json", "a/b/c", "../x", "~/none-such", "a/b.json"]
)
def test_what_looks_like_a_path_never_asks_the_hub(model):
    with pytest.raises(ConfigError) as e:
        open_checkpoint(model)
    assert str(e.value) == f"there is no file or directory {model}"


def test_usage_errors(tmp_path):
    make(tmp_path)
    with pytest.raises(UsageError, match="empty string"):
        open_checkpoint("")
    with pytest.raises(UsageError, match="--revision v1 does not apply"):
        open_checkpoint(str(tmp_path), revision="v1")
    with pytest.raises(UsageError, match="--revision v1 does not apply"):
        open_checkpoint("memory://x", revision="v1")
    (tmp_path / "m.gguf").write_text("")
    with pytest.raises(ConfigError, match="is neither a directory nor a JSON file"):
        open_checkpoint(str(tmp_path / "m.gguf"))
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(ConfigError, match="is neither a directory nor a JSON file"):
        open_checkpoint(str(tmp_path / "fifo.json"))


def test_a_huge_config_is_not_read(tmp_path):
    with open(make(tmp_path) / "config.json", "r+b") as f:
        f.truncate(2**40)
    with pytest.raises(ConfigError, match="has 1099511627776 bytes, and 33554432 are the most"):
        open_checkpoint(str(tmp_path))


def test_a_config_with_infinity_is_read(tmp_path):
    make(tmp_path, **{"config.json": '{"time_step_limit": [0.0, Infinity]}'})
    assert open_checkpoint(str(tmp_path)).config["time_step_limit"][1] == float("inf")


def test_links_to_weights_elsewhere_are_refused(tmp_path):
    (tmp_path / "elsewhere").write_bytes(weights("a"))
    make(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match="leads out of the directory"):
        open_checkpoint(str(tmp_path / "m")).tensors()
