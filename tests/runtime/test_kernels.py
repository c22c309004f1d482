"""Triton's kernels in its interpreter, beside what a CPU does, and through its compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_kernels_compile_for_a_gpu() -> None:
    pytest.importorskip("triton")
    cases = TESTS / "runtime" / "compiled.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases],
        env=environment,
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_kernels_do_what_a_cpu_does() -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "runtime.interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
