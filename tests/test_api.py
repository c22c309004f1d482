import doctest
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tightfit
from support.cli import tightfit as command
from support.configs import DIRECTORY
from tightfit.errors import UsageError

EXAMPLES = Path(__file__).parents[1] / "examples"
LLAMA = str(DIRECTORY / "Llama-3.1-8B.json")


def test_the_docstring_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DIRECTORY)
    (example,) = doctest.DocTestFinder().find(tightfit.plan, "plan")
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.tries >= 3
    assert runner.failures == 0


def test_the_same_as_the_command() -> None:
    plan = tightfit.plan(LLAMA, gpu="h100", tensor_parallel_size=2, max_model_len="32k")
    flags = ("--gpu", "h100", "--tensor-parallel-size", "2", "--max-model-len", "32k")
    done = command("plan", LLAMA, *flags, "--json")
    assert json.loads(json.dumps(plan.to_json())) == json.loads(done.stdout)


def test_python_values() -> None:
    plan = tightfit.plan(LLAMA, gpu_memory="24GiB", max_model_len=8192, enforce_eager=True)
    assert plan.options.max_model_len.value == 8192
    assert all(one.name != "cuda_graphs" for one in plan.ranks[0].components)
    with pytest.raises(UsageError, match="unknown option 'gpus'"):
        tightfit.plan(LLAMA, gpus=2)


def test_importing_is_instant() -> None:
    code = "import sys, tightfit; print([m for m in sys.modules if m.startswith('tightfit.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, os.fspath(EXAMPLES / "smallest_gpu.py"), LLAMA, "16k"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["h200"].endswith("sequences at once")
    assert lines["l4"].endswith(("sequences at once", "does not fit"))


@pytest.mark.parametrize("file", ["examples/github-workflow.yml", "docs/questions.md"])
def test_documents_name_flags_that_exist(file: str) -> None:
    from tightfit.cli.options import FLAGS
    from tightfit.cli.plan import plan

    text = (EXAMPLES.parent / file).read_text()
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
    own = {"--" + name.replace("_", "-") for name in inspect.signature(plan).parameters}
    flags = {"--" + name.replace("_", "-") for name in FLAGS}
    assert used <= own | flags | {"--json"}
    assert len(used) > 5
