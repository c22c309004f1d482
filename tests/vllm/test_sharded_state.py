"""The rank files load in a real vLLM, and it says what it says with the unsharded model."""

from pathlib import Path
from typing import Any

import pytest

from support.smollm2 import smollm2_or_skip
from support.tiny_families import SHARDED
from support.tiny_models import NAMES, make_tiny_model
from support.vllm_answers import ask
from support.work import write_shards

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SMOLLM2 = "SmolLM2-135M-Instruct"
# Four ranks on a few cores are slow, so variants of one layout stay at two. OLMo 2 cannot have
# more ranks than KV heads in vLLM, and we refuse it as well.
FOUR_RANKS = (
    "llama", "llama_mqa", "mistral", "qwen2_tied", "qwen3", "qwen3_moe", "mixtral", "phi3",
    "gemma2", "gemma3", "granite",
)  # fmt: skip
# vLLM's CPU build has no kernel for the scan of Mamba 1.
WITHOUT_KERNELS = ("mamba", "jamba")
# Prompts are text only, and this decoder attends to audio.
WITHOUT_TEXT = ("whisper",)
_LINEAR = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
# Latent attention differs between sizes in this build even unsharded, and linear attention is
# computed in bfloat16 only: these are held against the unsharded model on as many ranks.
AT_EQUAL_SIZE = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "kimi_k25", *_LINEAR)
BFLOAT16 = _LINEAR
CASES = [
    ("llama", 1),
    *((name, 2) for name in NAMES),
    *((name, 2) for name in SHARDED if name not in (*WITHOUT_KERNELS, *WITHOUT_TEXT)),
    *((name, 4) for name in FOUR_RANKS),
    *((SMOLLM2, size) for size in (1, 3)),
]

Answer = dict[str, Any]


def unsharded(name: str, size: int) -> int:
    """The key of what a case is held against."""
    return -size if name in AT_EQUAL_SIZE else -1


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Answer]:
    """One vLLM process for all models and sizes; size -n is the unsharded model on n ranks."""
    directory = tmp_path_factory.mktemp("vllm")
    jobs: dict[tuple[str, int], dict[str, object]] = {}
    for name, size in CASES:
        reference, dtype = unsharded(name, size), "bfloat16" if name in BFLOAT16 else "float32"
        if (name, reference) not in jobs:
            real = name == SMOLLM2
            source = smollm2_or_skip() if real else make_tiny_model(name, directory / name)
            jobs[name, reference] = {
                "directory": str(source),
                "load_format": "auto",
                "tp": -reference,
                "dtype": dtype,
            }
        out = directory / f"{name}-tp{size}"
        write_shards(Path(str(jobs[name, reference]["directory"])), out, size)
        jobs[name, size] = {
            "directory": str(out),
            "load_format": "sharded_state",
            "tp": size,
            "dtype": dtype,
        }
    return dict(zip(jobs, ask("vllm_jobs.py", list(jobs.values()), directory), strict=True))


@pytest.mark.parametrize(("name", "size"), CASES)
def test_vllm_says_the_same(answers: dict[tuple[str, int], Answer], name: str, size: int) -> None:
    reference, sharded = answers[name, unsharded(name, size)], answers[name, size]
    assert "error" not in reference, reference["error"]
    assert "error" not in sharded, sharded["error"]
    assert sharded["tokens"] == reference["tokens"]
    assert sharded["logprobs"] == pytest.approx(reference["logprobs"], abs=1e-2)
