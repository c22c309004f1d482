"""The rank files load in a real vLLM, and it says what it says with the unsharded model."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from support.tiny_models import NAMES, make_tiny_model
from support.work import write_shards

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SIZES = (1, 2, 4)
# vLLM refuses to copy KV heads of a model that normalizes all keys together, and so do we.
IMPOSSIBLE = {("olmo2", 4)}
PYTHON = os.environ.get("TIGHTFIT_VLLM_PYTHON")


def ask_vllm(jobs: list[dict[str, object]], directory: Path) -> list[dict[str, object]]:
    assert PYTHON, "TIGHTFIT_VLLM_PYTHON names the interpreter of a vLLM CPU environment"
    path = directory / "jobs.json"
    path.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("vllm_jobs.py")
    done = subprocess.run(
        [PYTHON, str(script), str(path)], stdout=subprocess.PIPE, text=True, check=False
    )
    answers = [
        json.loads(line.removeprefix("ANSWER "))
        for line in done.stdout.splitlines()
        if line.startswith("ANSWER ")
    ]
    assert len(answers) == len(jobs), done.stdout[-2000:]
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, object]]:
    """One vLLM process for all models and sizes; size 0 is the unsharded model."""
    directory = tmp_path_factory.mktemp("vllm")
    jobs: list[dict[str, object]] = []
    keys: list[tuple[str, int]] = []
    for name in NAMES:
        source = make_tiny_model(name, directory / name)
        keys.append((name, 0))
        jobs.append({"directory": str(source), "load_format": "auto", "tp": 1})
        for size in SIZES:
            if (name, size) in IMPOSSIBLE:
                continue
            out = directory / f"{name}-tp{size}"
            write_shards(source, out, size)
            keys.append((name, size))
            jobs.append({"directory": str(out), "load_format": "sharded_state", "tp": size})
    return dict(zip(keys, ask_vllm(jobs, directory), strict=True))


@pytest.mark.parametrize(
    ("name", "size"), [(n, s) for n in NAMES for s in SIZES if (n, s) not in IMPOSSIBLE]
)
def test_vllm_says_the_same(
    answers: dict[tuple[str, int], dict[str, object]], name: str, size: int
) -> None:
    reference, sharded = answers[name, 0], answers[name, size]
    assert "error" not in reference, reference["error"]
    assert "error" not in sharded, sharded["error"]
    assert sharded["tokens"] == reference["tokens"]
    assert sharded["logprobs"] == pytest.approx(reference["logprobs"], abs=1e-2)
