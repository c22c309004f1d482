"""Rank files of quantized multimodal models have what vLLM's loader wants, and fill it as it does.

Kernels are not chosen, because most are for GPUs: what is compared is the state before they
rearrange it.
"""

from pathlib import Path
from typing import Any

import pytest

from support.quantized_media import CASES, make_quantized_media
from support.vllm_answers import ask
from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.header import TensorInfo
from tightfit.sharding.rank_files import open_rank_files

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SIZED = [(model, scheme, size) for model, scheme in CASES for size in (1, 2)]
Answer = dict[str, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantized_media")
    for model, scheme in CASES:
        source = make_quantized_media(model, scheme, directory / _name(model, scheme))
        for size in (1, 2):
            write_shards(source, Path(f"{source}-tp{size}"), size)
    return directory


def _name(model: str, scheme: str) -> str:
    return f"{model}-{scheme}".replace(" ", "_")


@pytest.fixture(scope="module")
def answers(directory: Path) -> dict[tuple[str, str, int], Answer]:
    """One vLLM process builds all models."""
    jobs = []
    for model, scheme, size in SIZED:
        path = directory / _name(model, scheme)
        jobs.append(
            {"directory": str(path), "tp": size, "kernels": False, "sharded": f"{path}-tp{size}"}
        )
    return dict(zip(SIZED, ask("state_jobs.py", jobs, directory), strict=True))


@pytest.mark.parametrize(("model", "scheme", "size"), SIZED)
def test_state(
    answers: dict[tuple[str, str, int], Answer],
    directory: Path,
    model: str,
    scheme: str,
    size: int,
) -> None:
    answer = answers[model, scheme, size]
    assert "error" not in answer, answer["error"]
    ranks = open_rank_files(open_checkpoint(f"{directory / _name(model, scheme)}-tp{size}"))
    for rank, state in enumerate(answer["states"]):
        found: dict[str, TensorInfo] = {}
        for name, header in ranks.files.items():
            if name.startswith(f"model-rank-{rank}-"):
                found |= header
        assert {name: list(info.shape) for name, info in found.items()} == {
            name: shape for name, (shape, *_) in state.items()
        }
    assert answer["different"] == [[]] * size
