"""What vLLM's sharded-state loader wants of every family, and what we would write, are the same."""

from pathlib import Path
from typing import Any

import pytest

from support.tiny_families import SHARDED
from support.tiny_models import NAMES, make_tiny_model
from support.vllm_answers import ask
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel
from tightfit.model.stored import DEFAULT_LAYOUT, rank_tensors, stored_layout

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Nothing of these is built by stages in vLLM, or only a model of more layers.
WITHOUT_STAGES = ("glm4_moe", "glm4_moe_lite", "mamba2", "qwen3_moe", "whisper")
WITH_EXPERTS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoe", "granitemoeshared", "olmoe",
    "phimoe", "dots1", "gpt_oss", "llama4", "deepseek_v2", "deepseek_v3", "glm4_moe_lite",
    "granitemoehybrid", "jamba", "qwen3_next",
)  # fmt: skip
Case = tuple[str, int, int, bool]
CASES: list[Case] = [
    *((name, 2, 1, False) for name in (*NAMES, *SHARDED)),
    # Whole matrices, those of one rank, are in the stages.
    *((name, 1, 1 if name in WITHOUT_STAGES else 2, False) for name in (*NAMES, *SHARDED)),
    ("llama_tied", 2, 2, False),
    *((name, 2, 1, True) for name in WITH_EXPERTS),
]
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Answer = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {name: make_tiny_model(name, directory / name) for name in (*NAMES, *SHARDED)}


@pytest.fixture(scope="module")
def answers(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, Answer]:
    """One vLLM process builds all models, without weights."""
    jobs = [
        {"directory": str(models[name]), "tp": tp, "pp": pp, "ep": ep} for name, tp, pp, ep in CASES
    ]
    found = ask("state_jobs.py", jobs, tmp_path_factory.mktemp("jobs"))
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize(("name", "tp", "pp", "ep"), CASES)
def test_names_shapes_and_dtypes(
    answers: dict[Case, Answer],
    models: dict[str, Path],
    name: str,
    tp: int,
    pp: int,
    ep: bool,
) -> None:
    answer = answers[name, tp, pp, ep]
    assert "error" not in answer, answer["error"]
    spec = model_spec(open_checkpoint(str(models[name])).config)
    assert spec.verified_for_sharding
    parallel = Parallel(tensor_parallel_size=tp, pipeline_parallel_size=pp, expert_parallel=ep)
    ranks = parallel.ranks()
    for rank, state in zip(ranks, answer["states"], strict=True):
        tensors = rank_tensors(spec, rank, stored_layout(DEFAULT_LAYOUT))
        assert len({t.name for t in tensors}) == len(tensors)
        assert {t.name: list(t.shape) for t in tensors} == {n: s for n, (s, *_) in state.items()}
        for tensor in tensors:
            _, dtype, value = state[tensor.name]
            if tensor.parameter is None:
                assert (FLOATS[tensor.dtype], tensor.fill) == (dtype, value)
            else:
                # Files keep the dtype of the checkpoint, and vLLM converts on loading.
                assert dtype in FLOATS.values()
