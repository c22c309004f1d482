"""`tightfit run --serve` as a process: its end, its key, two ranks, and a real model."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from support.cli import assert_error, tightfit
from support.smollm2 import smollm2_or_skip
from tightfit.demo import tiny_checkpoint

pytestmark = pytest.mark.slow

SMALL = ("--max-model-len", "512", "--max-num-seqs", "4", "--max-num-batched-tokens", "64")
HELLO: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
ENDING = "ending: requests under way may go on for 30 s; a second signal ends them at once\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    process: subprocess.Popen[str]
    name: str
    url: str

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health") as answer:
            document: dict[str, Any] = json.load(answer)
        return document

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """The exit code, and what was said after the first line."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@contextmanager
def served(*arguments: str | Path, **environment: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "tightfit", "run", *map(str, arguments)]
    process = subprocess.Popen(
        [*command, "--serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stderr is not None
        said, match = "", None
        while match is None and (line := process.stderr.readline()):
            said += line
            match = re.fullmatch(r"serving (\S+) at (http://\S+:\d+/v1)\n", line)
        assert match, said
        yield Served(process=process, name=match[1], url=match[2])
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_let_requests_finish(model: Path, how: signal.Signals, code: int) -> None:
    with served(model, *SMALL) as server:
        stream = server.client().chat.completions.create(
            model=server.name,
            messages=HELLO,
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        server.process.send_signal(how)
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] == "length"
        _, errors = server.process.communicate(timeout=30)
        assert server.process.returncode == code
        assert errors == ENDING


def test_an_end_does_not_wait_for_ever(model: Path) -> None:
    with served(model, *SMALL, "--drain-seconds", "1", "--max-model-len", "2048") as server:
        stream = server.client().completions.create(
            model=server.name,
            prompt="Hello",
            max_tokens=2000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        code, errors = server.end(signal.SIGTERM)
        assert code == 0
        assert "Traceback" not in errors
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)


def test_keys_come_from_the_environment(model: Path) -> None:
    with served(model, *SMALL, "--host", "0.0.0.0", TIGHTFIT_API_KEY="abc") as server:
        with pytest.raises(openai.AuthenticationError):
            server.client("abd").models.list()
        assert server.client("abc").models.list().data[0].id == server.name
        assert server.health()["running"] == 0


def test_others_need_a_key(model: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TIGHTFIT_API_KEY"}
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        done = tightfit("run", model, "--serve", "--host", host, env=environment)
        assert_error(done, 2, f"--host {host} can be reached by others, and there is no API key")


def test_wrong_usage(model: Path) -> None:
    done = tightfit("run", model, "--serve", "--prompt", "Hello")
    assert_error(done, 2, "--serve and --prompt exclude each other")
    done = tightfit("run", model, "--serve", "--check")
    assert_error(done, 2, "--serve and --check exclude each other")
    done = tightfit("run", model, "--port", "5")
    assert_error(done, 2, "--port is an option of --serve")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = tightfit("run", model, *SMALL, "--serve", "--port", str(port))
        assert_error(done, 2, f"cannot listen at 127.0.0.1:{port}: Address already in use")


def test_two_ranks(model: Path) -> None:
    answers = []
    for size in ("1", "2"):
        options = ("-tp", size, "--dtype", "float32", "--served-model-name", "it")
        with served(model, *SMALL, *options) as server:
            client = server.client()
            found: dict[int, str] = {}

            def ask(i: int) -> None:
                done = client.completions.create(  # noqa: B023
                    model="it", prompt=f"Hello {i}", max_tokens=20 + i, temperature=0
                )
                found[i] = done.choices[0].text  # noqa: B023

            threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            answers.append(found)
            left = client.completions.create(model="it", prompt="x", max_tokens=400, stream=True)
            next(left)
            left.close()
            health = server.health()
            assert health["total_blocks"] > 0
            code, errors = server.end(signal.SIGTERM)
            assert code == (130 if size == "2" else 0)
            assert errors.removeprefix(ENDING).strip() in ("", "interrupted")
    assert answers[0] == answers[1]
    assert len(answers[0]) == 12


def test_a_real_model_streams_a_chat() -> None:
    with served(smollm2_or_skip(), *SMALL) as server:
        stream = server.client().chat.completions.create(
            model=server.name, messages=HELLO, max_tokens=12, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert "Paris" in text
        health = server.health()
        assert health["free_blocks"] == health["total_blocks"]
        assert server.end(signal.SIGTERM) == (0, ENDING)
