"""Several processes: tensor parallel results, and what happens when a rank dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.ranks import PROMPTS, all_logits, greedy, open_session
from support.tiny_models import NAMES
from tightfit.errors import ExitCode, RankFailedError
from tightfit.runtime.launch import launch_ranks

TinyModel = Callable[[str], Path]
TESTS = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}


def on_ranks(size: int, models: list[Path], out: Path) -> Path:
    command = [sys.executable, "-m", "runtime.ranks", str(out), *map(str, models)]
    assert launch_ranks(command, size, environment=ENVIRONMENT) == 0
    return out


@pytest.fixture(scope="module")
def two_ranks(
    tiny_model: TinyModel, uneven_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Results of two ranks for all models, from one launch."""
    models = [tiny_model(name) for name in NAMES] + [uneven_model]
    return on_ranks(2, models, tmp_path_factory.mktemp("two"))


def check(results: Path, path: Path) -> None:
    logits = load_file(results / f"{path.name}.safetensors")["logits"]
    alone = all_logits(open_session(path), PROMPTS[0])
    assert alone is not None
    torch.testing.assert_close(logits, alone, atol=1e-3, rtol=1e-4)
    assert json.loads((results / f"{path.name}.json").read_text()) == greedy(path)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_what_one_gives(name: str, tiny_model: TinyModel, two_ranks: Path) -> None:
    check(two_ranks, tiny_model(name))


def test_nine_heads_on_two_ranks(uneven_model: Path, two_ranks: Path) -> None:
    check(two_ranks, uneven_model)


def test_more_ranks_than_kv_heads(tiny_model: TinyModel, tmp_path: Path) -> None:
    models = [tiny_model("olmo2"), tiny_model("llama")]
    results = on_ranks(4, models, tmp_path)
    for model in models:
        check(results, model)


def test_the_exit_code_of_a_rank_is_that_of_the_job() -> None:
    program = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    assert launch_ranks([sys.executable, "-c", program], 2) == ExitCode.UNSUPPORTED


def test_a_crash_is_told_with_its_rank() -> None:
    program = "import os, time; os.environ['RANK'] == '1' and os._exit(7); time.sleep(60)"
    with pytest.raises(RankFailedError, match=r"rank 1 failed \(exit code 7\)"):
        launch_ranks([sys.executable, "-c", program], 2)


JOB = """
import sys
from tightfit.errors import RankFailedError
from tightfit.runtime.launch import launch_ranks
try:
    sys.exit(launch_ranks([sys.executable, "-c", sys.argv[1]], 2))
except RankFailedError as error:
    print(error.message, flush=True)
    sys.exit(error.exit_code)
"""
READY = """
import os, pathlib
path = pathlib.Path(os.environ["PIDS"], os.environ["RANK"])
path.with_suffix(".tmp").write_text(str(os.getpid()))
path.with_suffix(".tmp").rename(path)
"""
TALKING = f"""
import torch
from tightfit.runtime.dist import World
world = World.from_environment()
{READY}
while True:
    world.all_reduce(torch.zeros(1))
"""
WAITING = f"""
import time
from tightfit.runtime.launch import follow_launcher
follow_launcher()
{READY}
time.sleep(600)
"""

Job = tuple[subprocess.Popen[str], list[int]]


@pytest.fixture
def start_job(tmp_path: Path) -> Iterator[Callable[[str], Job]]:
    """Starts a launcher with two ranks; gives it, and the process ids of the ranks."""
    started: list[int] = []

    def start(program: str) -> Job:
        process = subprocess.Popen(
            [sys.executable, "-c", JOB, program],
            env={**os.environ, "PIDS": str(tmp_path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        started.append(process.pid)
        deadline = time.monotonic() + 90
        while not all((tmp_path / str(rank)).exists() for rank in (0, 1)):
            assert time.monotonic() < deadline, "the ranks did not start"
            assert process.poll() is None
            time.sleep(0.05)
        ranks = [int((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
        started.extend(ranks)
        return process, ranks

    yield start
    for pid in started:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_a_killed_rank_ends_the_job(start_job: Callable[[str], Job]) -> None:
    process, ranks = start_job(TALKING)
    os.kill(ranks[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=15)
    assert out.strip() == "rank 1 died (SIGKILL)"
    assert process.returncode == ExitCode.FINDING
    assert all_gone(ranks, 5)


def test_a_killed_launcher_leaves_no_rank(start_job: Callable[[str], Job]) -> None:
    process, ranks = start_job(WAITING)
    process.kill()
    process.communicate(timeout=15)
    assert all_gone(ranks, 5)


def test_an_interrupt_stops_all_ranks(start_job: Callable[[str], Job]) -> None:
    process, ranks = start_job(WAITING)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)
    assert process.returncode == ExitCode.INTERRUPTED
    assert all_gone(ranks, 5)


FAILING = """
import sys
from tightfit.errors import CheckpointError, TightfitError
from tightfit.runtime.dist import World
from tightfit.runtime.session import together
world = World.from_environment()
try:
    with together(world):
        if world.rank == 1:
            raise CheckpointError("no tensor", hint="shard again")
except TightfitError as error:
    print(f"rank {world.rank}: {error.message} ({error.hint})", flush=True)
    world.close()
    sys.exit(error.exit_code)
"""


def test_all_ranks_learn_why_one_failed(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_ranks([sys.executable, "-c", FAILING], 2) == ExitCode.INPUT
    # Two processes write at once, so their lines may run into each other.
    printed = capfd.readouterr().out
    assert "rank 0: no tensor (shard again)" in printed
    assert "rank 1: no tensor (shard again)" in printed
