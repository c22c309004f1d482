"""The KV pool of a real vLLM on a CPU is the planned one, to the block."""

import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.tiny_models import make_tiny_model
from tightfit.model.families import model_spec
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import this_machine
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.units import GiB

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PYTHON = os.environ.get("TIGHTFIT_VLLM_PYTHON")
SCRIPT = Path(__file__).with_name("cpu_pool_jobs.py")
SPACE = "VLLM_CPU_KVCACHE_SPACE"
_POOL = re.compile(r"KV cache size: ([\d,]+) tokens, .* per request: ([\d.]+)x")
_CONSUMED = re.compile(r"requested memory for the worker\. ([\d.]+) GiB memory was consumed")


@dataclass(frozen=True)
class Case:
    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    space: int | None = 1

    def job(self, directory: Path) -> dict[str, Any]:
        env = {} if self.space is None else {SPACE: str(self.space)}
        return {"model": str(directory), "env": env, "arguments": self.arguments}

    def plan(self, directory: Path) -> Plan:
        space = None if self.space is None else float(self.space)
        options = PlanOptions(
            device=this_machine(),
            entrypoint="llm",
            enforce_eager=True,
            cpu_kvcache_space=space,
            **self.arguments,
        )
        config = json.loads((directory / "config.json").read_bytes())
        return make_plan(model_spec(config), options, name=self.model)


CASES = (
    Case("llama"),
    Case("mistral"),
    Case("gemma2"),
    Case("gemma2", {"block_size": 16, "max_num_batched_tokens": 32, "max_num_seqs": 8}),
    Case("gemma3", {"max_num_batched_tokens": 64}),
    Case("olmo3"),
    Case("qwen3", {"kv_cache_memory_bytes": 300_000_000, "max_model_len": 200}, None),
    Case("qwen3_moe", {"kv_cache_memory_bytes": 300_000_000}, 2),
)
AUTOMATIC = Case("llama", {"gpu_memory_utilization": 0.2}, None)
REFUSED = Case("llama", {"kv_cache_memory_bytes": 100_000}, None)

Answer = tuple[dict[str, Any], str, Plan]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """One vLLM process for all: each answer with the lines that were logged for it."""
    assert PYTHON, "TIGHTFIT_VLLM_PYTHON names the interpreter of a vLLM CPU environment"
    directory = tmp_path_factory.mktemp("vllm")
    cases = (*CASES, AUTOMATIC, REFUSED)
    for model in {case.model for case in cases}:
        make_tiny_model(model, directory / model)
    jobs = directory / "jobs.json"
    jobs.write_text(json.dumps([case.job(directory / case.model) for case in cases]))
    done = subprocess.run([PYTHON, str(SCRIPT), str(jobs)], capture_output=True, text=True)
    *logs, _ = re.split(r"^ANSWER .*$", done.stdout, flags=re.MULTILINE)
    found = [json.loads(line) for line in re.findall(r"^ANSWER (.*)$", done.stdout, re.MULTILINE)]
    assert len(found) == len(cases), done.stdout[-2000:] + done.stderr[-4000:]
    plans = [case.plan(directory / case.model) for case in cases]
    return list(zip(found, logs, plans, strict=True))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.model for case in CASES])
def test_the_pool(answers: list[Answer], index: int) -> None:
    answer, log, plan = answers[index]
    assert "error" not in answer, answer["error"]
    logged = _POOL.search(log)
    assert logged is not None, log
    kv, options = plan.kv_cache, plan.options
    assert kv.num_blocks == answer["num_blocks"]
    assert kv.tokens == int(logged[1].replace(",", ""))
    assert f"{kv.max_concurrency:.2f}" == logged[2]
    assert options.max_num_batched_tokens.value == answer["max_num_batched_tokens"]
    assert options.max_num_seqs.value == answer["max_num_seqs"]
    assert options.cudagraph_capture_sizes is not None
    assert list(options.cudagraph_capture_sizes.value) == answer["capture_sizes"]


def test_the_rest_of_the_memory(answers: list[Answer]) -> None:
    """The worker runs inside the test's process here, which has imported less than a server's."""
    answer, log, plan = answers[len(CASES)]
    consumed = _CONSUMED.search(log)
    assert consumed is not None, answer.get("error", log)
    rank = plan.ranks[0]
    assert rank.budget_bytes is not None
    available = plan.kv_cache.available_bytes
    assert available is not None
    planned = (rank.budget_bytes - available) / GiB
    assert float(consumed[1]) - 0.05 < planned < float(consumed[1]) + 0.3


def test_the_refusal(answers: list[Answer]) -> None:
    answer, _, plan = answers[len(CASES) + 1]
    assert plan.verdict.engine_message is not None
    assert answer["error"].startswith("ValueError: " + plan.verdict.engine_message)
