"""`tightfit run --engine vllm`, with a process that behaves as a start-up of vLLM was recorded."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.cli import assert_error, tightfit
from support.configs import DIRECTORY

LOGS = Path(__file__).parents[1] / "data" / "logs"

# `LOG` is printed; `dies`, `hangs` or `serves` is what comes then.
STAND_IN = """#!{python}
import http.server, json, os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.argv[1] == "-c":
    print(json.dumps(["vllm", "0.25.1+cu129"]))
    sys.exit()
assert sys.argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"], sys.argv
open({told!r}, "w").write(json.dumps([sys.argv[3:], dict(os.environ)]))
child = subprocess.Popen(["sleep", "600"])
open({pids!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
sys.stdout.write(open({log!r}).read())
sys.stdout.flush()
if {how!r} == "dies":
    print("ValueError: No available memory for the cache blocks.")
    os._exit(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def reply(self, answer):
        body = json.dumps(answer).encode()
        self.send_response(503 if {how!r} == "hangs" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.reply({{"data": [{{"id": "it"}}]}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        usage = {{"prompt_tokens": 3, "completion_tokens": 2}}
        choice = {{"text": asked["prompt"] + "!", "finish_reason": "stop"}}
        self.reply({{"choices": [choice], "usage": usage}})
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

OPTIONS = ("--gpu", "h100", "--max-model-len", "8192", "--max-num-seqs", "1024")
TOKENS = ("--max-num-batched-tokens", "16384")
# The figures of the log come from several start-ups.
LENIENT = ("--tolerance", "20")


class StandIn:
    def __init__(self, directory: Path, log: str, how: str) -> None:
        self.path = directory / f"python-{how}"
        self._told, self._pids = directory / "told", directory / "pids"
        self.path.write_text(
            STAND_IN.format(
                python=sys.executable,
                told=str(self._told),
                pids=str(self._pids),
                log=str(LOGS / f"{log}.log"),
                how=how,
            )
        )
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)

    @property
    def told(self) -> tuple[list[str], dict[str, str]]:
        arguments, environment = json.loads(self._told.read_text())
        return arguments, environment

    def started(self) -> bool:
        return self._pids.exists() and len(self._pids.read_text().split()) == 2

    def assert_gone(self) -> None:
        """Nobody may be left of its process group."""
        deadline = time.monotonic() + 10
        for pid in map(int, self._pids.read_text().split()):
            while Path(f"/proc/{pid}").exists():
                if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                    break
                assert time.monotonic() < deadline
                time.sleep(0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "llama"
    directory.mkdir()
    shutil.copyfile(DIRECTORY / "Llama-3.1-8B.json", directory / "config.json")
    return directory


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"XDG_CONFIG_HOME": str(tmp_path / "config")}


def run(model: Path, stand_in: StandIn, *more: str, env: dict[str, str]) -> Any:
    arguments = ("run", model, "--engine", "vllm", "--vllm-python", stand_in.path)
    return tightfit(
        *arguments, *OPTIONS, *TOKENS, *LENIENT, "--load-format", "dummy", *more, env=env
    )


def test_planned_beside_logged(model: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    stand_in = StandIn(tmp_path, "v0.25.1", "serves")
    more = ("--json", "-p", "Hello", "--store-calibration", "--vllm-log", str(tmp_path / "log"))
    done = run(model, stand_in, *more, env=environment)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["engine"] == {"name": "vllm", "version": "0.25.1", "entrypoint": "server"}
    checks = {check["component"]: check for check in document["checks"]}
    assert {"model_load", "activation_peak", "non_torch", "cuda_graphs", "kv_cache"} <= {*checks}
    assert checks["model_load"]["measured_bytes"] == 15 * 2**30
    assert all(check["ok"] for check in document["checks"])
    assert document["log"]["mismatches"] == []
    (completion,) = document["completions"]
    assert (completion["prompt"], completion["text"]) == ("Hello", "Hello!")
    arguments, variables = stand_in.told
    assert arguments[:2] == ["--model", str(model)]
    assert arguments[arguments.index("--max-num-seqs") + 1] == "1024"
    assert arguments[arguments.index("--load-format") + 1] == "dummy"
    assert "--kv-cache-memory-bytes" not in arguments
    assert variables["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert (tmp_path / "log").read_text() == (LOGS / "v0.25.1.log").read_text()
    assert "remembered for h100-80gb" in done.stderr
    assert (tmp_path / "config" / "tightfit" / "calibration.json").exists()
    stand_in.assert_gone()


def test_a_table_and_a_mismatch(model: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    stand_in = StandIn(tmp_path, "v0.25.1", "serves")
    done = run(model, stand_in, env=environment)
    assert "as planned" in done.stdout
    assert "vLLM 0.25.1 ready after" in done.stdout
    assert "the KV cache holds 457,504 tokens" in done.stdout
    assert f"vllm serve {model} --host 127.0.0.1" in done.stderr
    assert "Model loading took 15.0 GiB" in done.stderr
    assert "Free memory after profiling" not in done.stderr
    done = run(model, stand_in, "--max-num-batched-tokens", "65536", env=environment)
    assert done.returncode == 4
    assert "differs from the plan" in done.stdout
    stand_in.assert_gone()


def test_a_vllm_that_dies_says_why(
    model: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    stand_in = StandIn(tmp_path, "v0.25.1", "dies")
    done = run(model, stand_in, "--json", env=environment)
    assert done.returncode == 1
    assert "error: vLLM did not start: ValueError: No available memory" in done.stderr
    assert done.stdout == ""
    stand_in.assert_gone()


def test_a_vllm_that_is_never_ready(
    model: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    stand_in = StandIn(tmp_path, "v0.25.1", "hangs")
    done = run(model, stand_in, "--json", "--startup-timeout", "3", env=environment)
    assert done.returncode == 1
    assert "error: vLLM was not ready in time" in done.stderr
    stand_in.assert_gone()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_all_its_processes(
    model: Path, tmp_path: Path, how: signal.Signals
) -> None:
    stand_in = StandIn(tmp_path, "v0.25.1", "hangs")
    command = [sys.executable, "-m", "tightfit", "run", model, "--engine", "vllm", *OPTIONS]
    process = subprocess.Popen(
        [*map(str, command), "--vllm-python", str(stand_in.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not stand_in.started():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    stand_in.assert_gone()


def test_wrong_usage(model: Path, tmp_path: Path) -> None:
    vllm = ("run", model, "--engine", "vllm")
    done = tightfit(*vllm, "--vllm-python", "/nowhere/python")
    assert_error(done, 2, "--vllm-python /nowhere/python is not an executable file")
    done = tightfit(*vllm, "--vllm-python", sys.executable)
    assert_error(done, 2, f"{sys.executable} has no vLLM")
    done = tightfit(*vllm, "--serve")
    assert_error(done, 2, "--engine vllm and --serve exclude each other")
    done = tightfit("run", model, "--store-calibration")
    assert_error(done, 2, "--store-calibration is an option of --engine vllm")
    stand_in = StandIn(tmp_path, "v0.25.1", "serves")
    done = tightfit(*vllm, "--vllm-python", stand_in.path, "--gpu", "t4")
    assert done.returncode == 1
    assert done.stderr.startswith("does not fit: ")
    assert not stand_in.started()
