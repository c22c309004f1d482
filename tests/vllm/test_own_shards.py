"""What vLLM's own script saves, which has no manifest, can be merged and cut again."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from support.tiny_models import make_tiny_model
from support.vllm_answers import ask
from support.work import merge_shards, write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
CASES = (("llama", 1), ("llama", 2), ("llama_tied", 1), ("llama_tied", 2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, Path]]:
    """By model and size: the plain checkpoint, and what vLLM has saved of it."""
    directory = tmp_path_factory.mktemp("saved")
    jobs: list[dict[str, Any]] = []
    found = {}
    for name, size in CASES:
        model, out = directory / name, directory / f"{name}-{size}"
        if not model.exists():
            make_tiny_model(name, model)
        out.mkdir()
        shutil.copy(model / "config.json", out)
        jobs.append(
            {
                "directory": str(model),
                "load_format": "auto",
                "tp": size,
                "dtype": "bfloat16",
                "save": str(out),
            }
        )
        found[name, size] = model, out
    for answer in ask("vllm_jobs.py", jobs, directory):
        assert "error" not in answer, answer["error"]
    return found


@pytest.mark.parametrize(("name", "size"), CASES)
def test_merged(
    saved: dict[tuple[str, int], tuple[Path, Path]], name: str, size: int, tmp_path: Path
) -> None:
    model, out = saved[name, size]
    merge_shards(out, tmp_path / "back")
    plain, back = open_checkpoint(str(model)), open_checkpoint(str(tmp_path / "back"))
    assert plain.tensors().keys() == back.tensors().keys()
    for key, info in plain.tensors().items():
        other = back.tensors()[key]
        assert (info.dtype, info.shape) == (other.dtype, other.shape)
        assert plain.source.read(
            info.file, info.offset, info.offset + info.nbytes
        ) == back.source.read(other.file, other.offset, other.offset + other.nbytes)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_cut_again(
    saved: dict[tuple[str, int], tuple[Path, Path]], name: str, size: int, tmp_path: Path
) -> None:
    model, out = saved[name, size]
    write_shards(out, tmp_path / "again", 4)
    write_shards(model, tmp_path / "direct", 4)
    for path in (tmp_path / "direct").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
