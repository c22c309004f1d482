"""The command line as its users have it: a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ESCAPE = "\x1b"
TIMEOUT_SECONDS = 120

Call = Callable[..., "subprocess.CompletedProcess[str]"]


def tightfit(
    *arguments: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `tightfit` with its output in pipes; `env` replaces the environment."""
    command = [sys.executable, "-m", "tightfit", *map(os.fspath, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=env,
        cwd=cwd,
        check=False,
        timeout=TIMEOUT_SECONDS,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def assert_error(done: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    """One line that says what happened, one that says what to do, and nothing on stdout."""
    assert done.returncode == code, done
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert error == f"error: {message}"
    assert hint.startswith("hint: ")
