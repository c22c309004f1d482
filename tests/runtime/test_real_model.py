"""SmolLM2-135M-Instruct, a real model with 9 heads: greedy tokens equal those of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.cli import tightfit
from support.smollm2 import smollm2_or_skip
from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.ranks.world import World
from tightfit.runtime.session import run_rank

pytestmark = pytest.mark.slow

MAX_TOKENS = 16
PROMPTS = (
    "The",
    "The capital of France is",
    "1, 2, 3, 4,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "Once upon a time there was a little girl who lived in a village near the forest. One day she",
    "Photosynthesis is the process by which plants turn light into " * 4,
    "A list of things to pack for a long journey by sea: a warm coat, a map, " * 12,
)


@pytest.fixture(scope="module")
def model() -> Path:
    return smollm2_or_skip()


@pytest.fixture(scope="module")
def expected(model: Path, reference: Callable[[Path], Any]) -> list[list[int]]:
    """transformers' continuation of each prompt by itself, in float32."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = reference(model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def answers(model: Path, prompts: tuple[str, ...]) -> list[list[int]]:
    checkpoint = open_checkpoint(str(model))
    options = EngineOptions(
        dtype="F32", max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64, num_blocks=256
    )
    report = run_rank(
        checkpoint,
        model_spec(checkpoint.config),
        options,
        world=World(),
        prompts=prompts,
        sampling=SamplingParams(max_tokens=MAX_TOKENS),
    )
    assert report is not None
    return [completion.token_ids for completion in report.completions]


def test_batched_together(model: Path, expected: list[list[int]]) -> None:
    assert answers(model, PROMPTS) == expected


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_alone(model: Path, expected: list[list[int]], i: int) -> None:
    assert answers(model, (PROMPTS[i],)) == [expected[i]]


@pytest.mark.parametrize("cut", ["plain", "rank files"])
def test_two_ranks(model: Path, expected: list[list[int]], cut: str, tmp_path: Path) -> None:
    if cut == "rank files":
        write_shards(model, tmp_path / "tp2", 2, layout="builtin")
        model = tmp_path / "tp2"
    prompts = [argument for prompt in PROMPTS for argument in ("-p", prompt)]
    size = ("-tp", "2", "--max-model-len", "512", "--dtype", "float32")
    done = tightfit(
        "run", model, *size, *prompts, "--raw", "--max-tokens", str(MAX_TOKENS), "--json"
    )
    document = json.loads(done.stdout)
    assert [c["token_ids"] for c in document["completions"]] == expected
    for check in document["checks"]:
        if check["component"] in ("weights", "kv_cache"):
            assert abs(check["difference_bytes"]) <= 0.01 * check["planned_bytes"]
        if check["component"] == "total":
            assert abs(check["difference_bytes"]) <= 0.1 * check["planned_bytes"]
    assert done.returncode == 0, done.stderr
