"""Quantized rank files have what vLLM's loader wants, and fill it as an unsharded load does.

Kernels are not chosen, because most are for GPUs: what is compared is the state before they
rearrange it.
"""

from pathlib import Path
from typing import Any

import pytest

from support.quantized_models import SECTIONS, make_quantized_model
from support.vllm_answers import ask
from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.header import TensorInfo
from tightfit.sharding.rank_files import open_rank_files

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PLAIN = [scheme for scheme in SECTIONS if scheme != "mxfp4"]
GLOBAL = ("modelopt NVFP4", "modelopt W4A16_NVFP4")
"""Whole experts are refused."""
DEALT = [scheme for scheme in PLAIN if scheme not in GLOBAL]
Case = tuple[str, str, int, bool]
CASES: list[Case] = [
    *((scheme, "dense", size, False) for scheme in PLAIN for size in (1, 2)),
    *((scheme, model, 2, False) for scheme in PLAIN for model in ("experts", "latent")),
    *(("mxfp4", model, size, False) for model in ("gpt_oss", "odd_gpt_oss") for size in (1, 2)),
    *((scheme, "experts", 2, True) for scheme in DEALT),
    *((scheme, "latent", 2, True) for scheme in ("fp8 block", "INT8", "W4A16")),
    ("mxfp4", "gpt_oss", 2, True),
    # By width, four ranks would not get whole blocks.
    ("fp8 block", "experts", 4, True),
    ("fp8 block", "five_experts", 2, True),
]
RUNNING = ("INT8", "FP8_DYNAMIC")
"""The CPU build has kernels for these everywhere."""
UNUSED = ("input_scale", "input_global_scale")
"""Of schemes for weights alone: vLLM makes room for them, and leaves there what was in memory."""
Answer = dict[str, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantized")
    for scheme, model in {(scheme, model) for scheme, model, *_ in CASES}:
        make_quantized_model(scheme, model, directory / _name(scheme, model))
    for scheme, model, size, ep in CASES:
        source = directory / _name(scheme, model)
        write_shards(source, _sharded(source, size, ep), size, expert_parallel=ep)
    return directory


def _sharded(source: Path, size: int, ep: bool) -> Path:
    return source.with_name(f"{source.name}-{'ep' if ep else 'tp'}{size}")


def _name(scheme: str, model: str) -> str:
    return f"{scheme}-{model}".replace(" ", "_").replace(",", "")


@pytest.fixture(scope="module")
def answers(directory: Path) -> dict[Case, Answer]:
    """One vLLM process builds all models."""
    jobs = []
    for scheme, model, size, ep in CASES:
        path = directory / _name(scheme, model)
        out = _sharded(path, size, ep)
        jobs.append(
            {
                "directory": str(path),
                "tp": size,
                "ep": ep,
                "kernels": False,
                "sharded": str(out),
                # Where it makes experts wider than they are, vLLM begins with zeros.
                "memory": 0 if scheme == "mxfp4" else 77,
            }
        )
    return dict(zip(CASES, ask("state_jobs.py", jobs, directory), strict=True))


@pytest.mark.parametrize(("scheme", "model", "size", "ep"), CASES)
def test_names_and_shapes(
    answers: dict[Case, Answer], directory: Path, scheme: str, model: str, size: int, ep: bool
) -> None:
    answer = answers[scheme, model, size, ep]
    assert "error" not in answer, answer["error"]
    out = _sharded(directory / _name(scheme, model), size, ep)
    ranks = open_rank_files(open_checkpoint(str(out)))
    for rank, state in enumerate(answer["states"]):
        found: dict[str, TensorInfo] = {}
        for name, header in ranks.files.items():
            if name.startswith(f"model-rank-{rank}-"):
                found |= header
        shapes = {name: list(info.shape) for name, info in found.items()}
        room = {name: shape for name, (shape, *_) in state.items()}
        if scheme == "mxfp4":
            # Kernels want wider experts, each another width.
            assert shapes.keys() == room.keys()
            assert all(n <= m for k in room for n, m in zip(shapes[k], room[k], strict=True))
        else:
            assert shapes == room


@pytest.mark.parametrize(("scheme", "model", "size", "ep"), CASES)
def test_same_state_as_unsharded(
    answers: dict[Case, Answer], scheme: str, model: str, size: int, ep: bool
) -> None:
    answer = answers[scheme, model, size, ep]
    assert "error" not in answer, answer["error"]
    weights_alone = scheme in ("modelopt W4A16_NVFP4", "NVFP4A16")
    for names in answer["different"]:
        assert [n for n in names if not (weights_alone and n.endswith(UNUSED))] == []


@pytest.fixture(scope="module")
def tokens(directory: Path) -> dict[tuple[str, str], Answer]:
    """What vLLM says with the rank files, and without."""
    jobs = {}
    for scheme in RUNNING:
        path = str(directory / _name(scheme, "dense"))
        for size in (1, 2):
            # Each rank scales its share of the activations by itself: sizes differ even unsharded.
            job = {"directory": path, "load_format": "auto", "tp": size}
            jobs[scheme, f"unsharded{size}"] = job
            job = {"directory": f"{path}-tp{size}", "load_format": "sharded_state", "tp": size}
            jobs[scheme, f"tp{size}"] = job
    return dict(zip(jobs, ask("vllm_jobs.py", list(jobs.values()), directory), strict=True))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("scheme", RUNNING)
def test_same_tokens(tokens: dict[tuple[str, str], Answer], scheme: str, size: int) -> None:
    reference, sharded = tokens[scheme, f"unsharded{size}"], tokens[scheme, f"tp{size}"]
    assert "error" not in reference, reference["error"]
    assert "error" not in sharded, sharded["error"]
    assert sharded["tokens"] == reference["tokens"]
    assert sharded["logprobs"] == pytest.approx(reference["logprobs"], abs=1e-2)
