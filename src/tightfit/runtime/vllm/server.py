"""A real vLLM as a process: started, watched while it starts, asked, and stopped with its ranks."""

import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import IO, Any

from tightfit.errors import RankFailedError, UsageError
from tightfit.sharding.proof.vllm_load import last_error

_POLL_SECONDS = 0.5
_STOP_SECONDS = 30
_ANSWER_SECONDS = 600
_MOST_ANSWER_BYTES = 16 * 2**20
_ASK = """
import importlib.metadata as m, json
name = (m.packages_distributions().get("vllm") or [""])[0]
print(json.dumps([name, m.version(name) if name else ""]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A vLLM that an interpreter has."""

    python: str
    version: str
    for_cpus: bool


def installed(python: str) -> Installed:
    """Which vLLM it is; without importing it, which takes half a minute.

    Raises:
        UsageError: the interpreter has none, or cannot be started.
    """
    hint = "give the interpreter of the environment in which vLLM is installed (--vllm-python)"
    try:
        done = subprocess.run(
            [python, "-c", _ASK], capture_output=True, text=True, timeout=120, check=True
        )
        name, version = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UsageError(f"{python} cannot be asked for its vLLM", hint=hint) from error
    if not name:
        raise UsageError(f"{python} has no vLLM", hint=hint)
    return Installed(
        python=python, version=version, for_cpus="cpu" in name.lower() or "+cpu" in version
    )


class VLLMServer:
    """A server that is ready."""

    def __init__(self, url: str, ready_seconds: float) -> None:
        self._url = url
        self.ready_seconds = ready_seconds

    def ask(self, prompt: str, *, chat: bool, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """A completion as `run --json` has it.

        Raises:
            RankFailedError: it does not answer.
        """
        (model, *_) = self._request("/v1/models")["data"]
        body = {"model": model["id"], **sampling}
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        answer = self._request(f"/v1/{'chat/' if chat else ''}completions", body)
        choice = answer["choices"][0]
        return {
            "prompt": prompt,
            "text": (choice["message"]["content"] if chat else choice["text"]) or "",
            "prompt_tokens": answer["usage"]["prompt_tokens"],
            "completion_tokens": answer["usage"]["completion_tokens"],
            "finish_reason": choice["finish_reason"],
        }

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with _DIRECT.open(request, timeout=_ANSWER_SECONDS) as answer:
                found: dict[str, Any] = json.loads(answer.read(_MOST_ANSWER_BYTES))
                return found
        except (OSError, ValueError) as error:
            why = error.read(500).decode(errors="replace") if hasattr(error, "read") else error
            raise RankFailedError(
                f"vLLM does not answer: {why}", hint="see what it printed (--vllm-log)"
            ) from error


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy has no business between two processes of this machine."""


@contextmanager
def vllm_server(
    arguments: Sequence[str],
    *,
    python: str,
    environment: Mapping[str, str],
    log: Path,
    timeout_seconds: float,
    heard: Callable[[str], None],
) -> Iterator[VLLMServer]:
    """Start vLLM, give it once it is ready, and stop all its processes in the end.

    Args:
        arguments: of `vllm serve`: the model first, without a port.
        python: its interpreter.
        environment: variables beside those of this process.
        log: gets everything that it prints.
        timeout_seconds: how long it may take to be ready.
        heard: gets every line as it comes.

    Raises:
        UsageError: it cannot be started, or the log cannot be written.
        RankFailedError: it ends before it is ready, or is not ready in time.
    """
    url = f"http://127.0.0.1:{(port := _free_port())}"
    # Some builds have another name, under which the command `vllm` does not find its own version.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", *arguments]
    command += ["--port", str(port)]
    tail: deque[str] = deque(maxlen=500)
    started = monotonic()
    try:
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                # Its ranks are processes of their own, and go with it.
                start_new_session=True,
            )
            assert process.stdout is not None
            stops = Event()

            def told(line: str) -> None:
                tail.append(line)
                # Whoever is told to stop complains.
                if not stops.is_set():
                    heard(line)

            listener = Thread(target=_listen, args=(process.stdout, file, told), daemon=True)
            listener.start()
            try:
                _wait(process, url, started + timeout_seconds, tail)
                yield VLLMServer(url, monotonic() - started)
            finally:
                stops.set()
                _stop(process)
                listener.join(5)
    except OSError as error:
        raise UsageError(
            f"cannot start vLLM or write its log {log}: {error.strerror}",
            hint="check --vllm-python and --vllm-log",
        ) from error


def _wait(
    process: "subprocess.Popen[bytes]", url: str, deadline: float, tail: Sequence[str]
) -> None:
    while process.poll() is None:
        with suppress(OSError), _DIRECT.open(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        if monotonic() > deadline:
            raise RankFailedError(
                "vLLM was not ready in time", hint="give it more time (--startup-timeout)"
            )
        sleep(_POLL_SECONDS)
    # What it printed last may still be in the pipe.
    sleep(_POLL_SECONDS)
    code = process.returncode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    raise RankFailedError(
        f"vLLM did not start: {last_error(list(tail)) or f'its process ended with {how}'}",
        hint="see what it printed (--vllm-log); does the plan know this model and version?",
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask its first process, which stops the others: killed ones leave files in /dev/shm."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _listen(stream: IO[bytes], file: IO[bytes], heard: Callable[[str], None]) -> None:
    with suppress(ValueError, OSError):
        for data in stream:
            file.write(data)
            file.flush()
            heard(data.decode(errors="replace").rstrip("\r\n"))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
