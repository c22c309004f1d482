"""Ask a real vLLM (CPU build), by one of the scripts in `tests/vllm`."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PYTHON = os.environ.get("TIGHTFIT_VLLM_PYTHON")
_SCRIPTS = Path(__file__).parent.parent / "vllm"


def ask(script: str, jobs: Sequence[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """An answer to each job, from one process; `directory` is for the list of jobs."""
    assert PYTHON, "TIGHTFIT_VLLM_PYTHON names the interpreter of a vLLM CPU environment"
    path = directory / "jobs.json"
    path.write_text(json.dumps(list(jobs)))
    command = [PYTHON, str(_SCRIPTS / script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(lines) == len(jobs), done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line.removeprefix("ANSWER ")) for line in lines]
