import os

import pytest

from support.cli import ESCAPE, tightfit
from tightfit import __version__
from tightfit.cli.main import COMMANDS


def test_help() -> None:
    done = tightfit("--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for words in (
        "0 done",
        "1 it does not fit",
        "2 wrong usage",
        "3 the model",
        "4 planned",
        "130",
    ):
        assert words in text
    assert all(command in text for command in COMMANDS)
    assert ESCAPE not in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str) -> None:
    done = tightfit(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Example: tightfit {command}" in " ".join(done.stdout.split())
    assert ESCAPE not in done.stdout


@pytest.mark.parametrize("columns", [60, 80, 110, 160])
@pytest.mark.parametrize("command", ["plan", "run", "shard"])
def test_help_names_options_in_full(command: str, columns: int) -> None:
    done = tightfit(command, "--help", env={**os.environ, "COLUMNS": str(columns)})
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout


def test_help_of_run_tells_what_only_vllm_takes() -> None:
    ours, vllms = tightfit("run", "--help").stdout.split("With --engine vllm:")
    assert "--block-size" in ours
    assert "--mm-encoder-tp-mode" not in ours
    assert "--mm-encoder-tp-mode" in vllms


def test_version() -> None:
    assert tightfit("--version").stdout == f"tightfit {__version__}\n"


@pytest.mark.parametrize("arguments", [["plam"], ["plan"], ["plan", "x", "--colour"], ["--colour"]])
def test_usage(arguments: list[str]) -> None:
    done = tightfit(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: " in done.stderr
    assert ESCAPE not in done.stderr
