"""Whether a real vLLM loads rank files: a subprocess, in vLLM's environment, tries it.

Names and shapes are only what was known of vLLM when a layout was written down. Here its own loader
reads the files, and the model has to say something: what was left uninitialised gives no numbers.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Any

from tightfit.errors import UsageError, VerificationError
from tightfit.model.stored.layouts import StoredLayout, stored_layout
from tightfit.sharding.manifest import Manifest

PYTHON_VARIABLE = "TIGHTFIT_VLLM_PYTHON"

_ERROR = re.compile(r"((?:\w+\.)*\w*(?:Error|Exception)): (.+)")
_SECOND_HAND = ("Engine core initialization failed", "Worker failed with error", "WorkerProc ")
_MOST_TOKENS = 128
_CHILD = Path(__file__).with_name("vllm_child.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What vLLM said."""

    version: str
    device: str
    ranks: int
    tokens: tuple[int, ...]
    load_seconds: float
    generation_seconds: float

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return asdict(self)


def load_in_vllm(
    directory: Path,
    manifest: Manifest,
    *,
    python: str | None,
    timeout_seconds: float,
    on_line: Callable[[str], None],
) -> Loaded:
    """Load rank files with `--load-format sharded_state` and generate a few tokens.

    `python` is the interpreter of vLLM's environment; else that of `TIGHTFIT_VLLM_PYTHON`, or this
    one. `on_line` gets what vLLM prints.

    Raises:
        UsageError: there is no vLLM, or not one for this layout, or it has too few devices.
        VerificationError: vLLM does not load the files, or not in time, or computes no numbers.
    """
    layout = stored_layout(manifest.layout)
    read_by = _versions(layout)
    interpreter = find_interpreter(python)
    ranks = manifest.tensor_parallel_size * manifest.pipeline_parallel_size
    job = {
        "directory": str(directory.absolute()),
        "tensor_parallel_size": manifest.tensor_parallel_size,
        "pipeline_parallel_size": manifest.pipeline_parallel_size,
        "versions": read_by,
        "enable_expert_parallel": manifest.expert_parallel,
        "max_model_len": _MOST_TOKENS,
    }
    tail: deque[str] = deque(maxlen=500)

    def heard(line: str) -> None:
        tail.append(line)
        on_line(line)

    answer, code = _ask(interpreter, job, timeout_seconds, heard)
    if answer is None and code is None:
        raise VerificationError(
            f"vLLM had not loaded {directory} after {timeout_seconds:g} s",
            hint="give it more time (--load-timeout)",
        )
    if answer is None:
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        answer = {"error": last_error(tail) or f"its process ended with {how}"}
    _refuse(answer, manifest, interpreter, ranks)
    version = answer.get("version", "")
    if "error" in answer:
        error = answer["error"]
        if any(words in error for words in _SECOND_HAND):
            error = last_error(tail) or error
        raise VerificationError(
            f"vLLM {version} does not load {directory}: {error}".replace("vLLM  ", "vLLM "),
            hint="vLLM's own messages are above (without --quiet); `tightfit shard` again for this "
            "version may help",
        )
    if not answer["finite"]:
        raise VerificationError(
            f"vLLM {version} loads {directory}, and computes no numbers with it (NaN)",
            hint="weights are missing or damaged; see what `tightfit verify --against` says",
        )
    return Loaded(
        version=version,
        device=answer["device"],
        ranks=ranks,
        tokens=tuple(answer["tokens"]),
        load_seconds=answer["load_seconds"],
        generation_seconds=answer["generation_seconds"],
    )


def show_versions(layout: StoredLayout) -> str:
    """`0.32 to 0.33`.

    Raises:
        UsageError: it is not for vLLM.
    """
    first, last = (".".join(map(str, one)) for one in _versions(layout))
    return first if first == last else f"{first} to {last}"


def _versions(layout: StoredLayout) -> tuple[tuple[int, int], tuple[int, int]]:
    if layout.versions is None:
        raise UsageError(
            f"layout {layout.name} is not for vLLM",
            hint="shard the model again with a layout of vLLM (--layout)",
        )
    return layout.versions


def find_interpreter(python: str | None, option: str = "--python") -> str:
    """The interpreter that `option` names, or `TIGHTFIT_VLLM_PYTHON`, or this one if it has vLLM.

    Raises:
        UsageError: there is no such file, or no vLLM here.
    """
    wanted = python or os.environ.get(PYTHON_VARIABLE)
    if wanted:
        found = shutil.which(wanted)
        if found is None:
            where = option if python else PYTHON_VARIABLE
            raise UsageError(
                f"{where} {wanted} is not an executable file",
                hint="give the interpreter of the environment in which vLLM is installed",
            )
        return found
    spec = importlib.util.find_spec("vllm")
    # A directory of that name is a package too, without an origin.
    if spec is None or spec.origin is None:
        raise UsageError(
            "vLLM is not installed in this environment",
            hint=f"say where it is: {option} /path/to/its/bin/python, or {PYTHON_VARIABLE}",
        )
    return sys.executable


def _ask(
    interpreter: str, job: dict[str, Any], timeout_seconds: float, heard: Callable[[str], None]
) -> tuple[dict[str, Any] | None, int | None]:
    """The answer and the exit code; no code if the time was over."""
    reader, writer = os.pipe()
    command = [interpreter, str(_CHILD), json.dumps(job | {"fd": writer})]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[writer],
            # Ranks of vLLM are processes of their own, and go with it.
            start_new_session=True,
        )
    except OSError as error:
        os.close(reader)
        raise UsageError(
            f"cannot start {interpreter}: {error.strerror}", hint="check --python"
        ) from error
    finally:
        os.close(writer)
    assert process.stdout is not None
    listener = Thread(target=_listen, args=(process.stdout, heard), daemon=True)
    listener.start()
    code = None
    try:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout_seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        listener.join(5)
        # Who has left the process group may keep the other end open for ever.
        os.set_blocking(reader, False)
        with os.fdopen(reader, "rb", buffering=0) as file:
            data = file.read(2**20)
    try:
        answer = json.loads(data or b"")
    except ValueError:
        return None, code
    return answer if isinstance(answer, dict) else None, code


def _listen(stream: IO[str], heard: Callable[[str], None]) -> None:
    with suppress(ValueError, OSError):
        for line in stream:
            heard(line.rstrip("\n"))


def last_error(lines: Sequence[str]) -> str | None:
    """The last exception in what vLLM printed that is not the echo of another."""
    for line in reversed(lines):
        match = _ERROR.search(line)
        if match and not any(words in line for words in _SECOND_HAND):
            return match[0]
    return None


def _refuse(answer: dict[str, Any], manifest: Manifest, interpreter: str, ranks: int) -> None:
    why = answer.get("refused")
    if why == "not installed":
        raise UsageError(
            f"{interpreter} has no vLLM",
            hint="give the interpreter of the environment in which vLLM is installed (--python)",
        )
    if why == "version":
        for_vllm = show_versions(stored_layout(manifest.layout))
        raise UsageError(
            f"layout {manifest.layout} is for vLLM {for_vllm}, and {interpreter} has "
            + answer["version"],
            hint="use such a version, or shard the model again with another --layout",
        )
    if why == "devices":
        count = answer["devices"]
        raise UsageError(
            f"{ranks} ranks need {ranks} devices, and vLLM sees {count} ({answer['device']})",
            hint="load it on a larger machine, or shard the model for fewer ranks; a build of vLLM "
            "for CPUs loads any number",
        )
