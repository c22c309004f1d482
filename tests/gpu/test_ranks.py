"""Two GPUs give the tokens that one CPU gives, from plain checkpoints and from rank files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.ranks import PROMPTS, all_logits, greedy, open_session, sampled
from runtime.test_ranks import ENVIRONMENT
from support.work import write_shards
from tightfit.runtime.ranks.launch import launch_ranks

TinyModel = Callable[[str], Path]
NAMES = ("llama", "gemma2", "qwen3_moe", "llama_mqa")

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def on_gpus(models: list[Path], out: Path, *flags: str) -> None:
    command = [sys.executable, "-m", "runtime.ranks", "--cuda", *flags, str(out), *map(str, models)]
    assert launch_ranks(command, 2, environment=ENVIRONMENT) == 0


def check(out: Path, name: str, path: Path) -> None:
    logits = load_file(out / f"{name}.safetensors")["logits"]
    alone = all_logits(open_session(path), PROMPTS[0])
    assert alone is not None
    torch.testing.assert_close(logits, alone, atol=1e-3, rtol=1e-3)
    assert json.loads((out / f"{name}.json").read_text()) == greedy(path)
    assert json.loads((out / f"{name}-sampled.json").read_text()) == sampled(path)


def test_tensor_parallel(tiny_model: TinyModel, tmp_path: Path) -> None:
    plain = [tiny_model(name) for name in NAMES]
    sharded = tmp_path / "llama-tp2"
    write_shards(plain[0], sharded, 2)
    on_gpus([*plain, sharded], tmp_path)
    for path in plain:
        check(tmp_path, path.name, path)
    check(tmp_path, sharded.name, plain[0])


def test_pipeline_parallel(tiny_model: TinyModel, tmp_path: Path) -> None:
    plain = [tiny_model(name) for name in ("llama_tied", "gemma3")]
    on_gpus(plain, tmp_path, "--stages=2")
    for path in plain:
        check(tmp_path, path.name, path)
