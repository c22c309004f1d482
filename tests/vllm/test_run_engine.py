"""`tightfit run --engine vllm` with a real vLLM: its pool is the planned one, and it answers."""

import json
import os

import pytest

from support.cli import tightfit
from support.smollm2 import smollm2_or_skip

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PYTHON = os.environ.get("TIGHTFIT_VLLM_PYTHON")
# In bfloat16 two first words are almost as likely, and processors differ.
OPTIONS = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8",
           "--kv-cache-memory-bytes", "300MB")  # fmt: skip


def test_a_start_up_as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PYTHON, "TIGHTFIT_VLLM_PYTHON names the interpreter of a vLLM CPU environment"
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    monkeypatch.setattr("support.cli.TIMEOUT_SECONDS", 600)
    question = ("-p", "What is the capital of France?", "--max-tokens", "10")
    arguments = ("--engine", "vllm", *OPTIONS, "--enforce-eager", *question, "--json")
    done = tightfit("run", smollm2_or_skip(), *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["log"]["mismatches"] == []
    lines = {line["name"]: line for line in document["log"]["lines"]}
    assert lines["kv_tokens"]["difference"] == 0
    assert [check["component"] for check in document["checks"] if check["ok"]]
    assert "Paris" in document["completions"][0]["text"]
