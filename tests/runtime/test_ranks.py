"""Several processes: tensor parallel results, and what happens when a rank dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import DistBackendError

from runtime.ranks import PROMPTS, all_logits, greedy, open_session, sampled
from support.tiny_models import NAMES
from tightfit.errors import DeviceError, ExitCode, RankFailedError, UsageError
from tightfit.runtime.ranks import world as dist
from tightfit.runtime.ranks.heartbeat import Neighbours, introduction
from tightfit.runtime.ranks.launch import launch_ranks
from tightfit.runtime.ranks.world import World

TinyModel = Callable[[str], Path]
TESTS = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}


def on_ranks(
    size: int, models: list[Path], out: Path, *, stages: int = 1, only_logits: bool = False
) -> Path:
    flags = [f"--stages={stages}", *(["--logits"] if only_logits else [])]
    command = [sys.executable, "-m", "runtime.ranks", *flags, str(out), *map(str, models)]
    assert launch_ranks(command, size, environment=ENVIRONMENT) == 0
    return out


@pytest.fixture(scope="module")
def two_ranks(
    tiny_model: TinyModel, uneven_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Results of two ranks for all models, from one launch."""
    models = [tiny_model(name) for name in NAMES] + [uneven_model]
    return on_ranks(2, models, tmp_path_factory.mktemp("two"))


def check(results: Path, path: Path, name: str | None = None) -> None:
    """The results of a directory of that name, if it has another one, are those of a model."""
    found = results / (name or path.name)
    logits = load_file(f"{found}.safetensors")["logits"]
    alone = all_logits(open_session(path), PROMPTS[0])
    assert alone is not None
    torch.testing.assert_close(logits, alone, atol=1e-3, rtol=1e-4)
    assert json.loads(Path(f"{found}.json").read_text()) == greedy(path)
    assert json.loads(Path(f"{found}-sampled.json").read_text()) == sampled(path)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_what_one_gives(name: str, tiny_model: TinyModel, two_ranks: Path) -> None:
    check(two_ranks, tiny_model(name))


def test_nine_heads_on_two_ranks(uneven_model: Path, two_ranks: Path) -> None:
    check(two_ranks, uneven_model)


def test_nine_heads_on_three_ranks(uneven_model: Path, tmp_path: Path) -> None:
    check(on_ranks(3, [uneven_model], tmp_path), uneven_model)


def test_more_ranks_than_kv_heads(tiny_model: TinyModel, tmp_path: Path) -> None:
    models = [tiny_model("olmo2"), tiny_model("llama")]
    results = on_ranks(4, models, tmp_path)
    for model in models:
        check(results, model)


def test_the_exit_code_of_a_rank_is_that_of_the_job() -> None:
    program = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert launch_ranks([sys.executable, "-c", program], 2) == ExitCode.UNSUPPORTED
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_crash_is_told_with_its_rank() -> None:
    program = "import os, time; os.environ['RANK'] == '1' and os._exit(7); time.sleep(60)"
    with pytest.raises(RankFailedError, match=r"rank 1 failed \(exit code 7\)"):
        launch_ranks([sys.executable, "-c", program], 2)


JOB = """
import sys
from tightfit.errors import RankFailedError
from tightfit.runtime.ranks.launch import launch_ranks
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
from tightfit.runtime.ranks.world import World
world = World.from_environment()
{READY}
while True:
    world.all_reduce(torch.zeros(1))
"""
WAITING = f"""
import time
from tightfit.runtime.ranks.launch import follow_launcher
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


@pytest.mark.parametrize("program", [TALKING, WAITING], ids=["talking", "waiting"])
def test_a_rank_that_hangs_ends_the_job(
    start_job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setenv("TIGHTFIT_RANK_TIMEOUT", "3")
    process, ranks = start_job(program)
    os.kill(ranks[1], signal.SIGSTOP)
    out, _ = process.communicate(timeout=15)
    assert out.strip() == "rank 1 hung: no sign of life for 3 seconds"
    assert process.returncode == ExitCode.FINDING
    assert all_gone(ranks, 5)


def test_a_launcher_that_was_stopped_itself_kills_nobody(
    start_job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIGHTFIT_RANK_TIMEOUT", "2")
    process, ranks = start_job(WAITING)
    pids = [*ranks, process.pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(4)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
    time.sleep(1)
    assert all(map(alive, pids))


SILENT = """
import sys, time
from tightfit.errors import RankFailedError
from tightfit.runtime.ranks import world as dist
dist._IDLE_SECONDS = 1.0
world = dist.World.from_environment()
world.loaded()
if world.rank == 1:
    time.sleep(600)
try:
    world.gather_bytes(b"")
except RankFailedError as error:
    print(error.message, flush=True)
    sys.exit(error.exit_code)
"""


def test_ranks_wait_for_a_step_no_longer_than_they_are_told(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIGHTFIT_STEP_TIMEOUT", "1")
    with pytest.raises(RankFailedError, match="rank 0 failed"):
        launch_ranks([sys.executable, "-c", SILENT], 2)
    assert "rank 0 lost the connection to another rank" in capfd.readouterr().out


class Unfinished:
    """An event that a GPU never comes to."""

    def query(self) -> bool:
        return False


def test_a_gpu_that_does_not_finish_a_step_ends_it() -> None:
    world = World(size=2)
    world._step_seconds = 0.05
    with pytest.raises(RankFailedError, match=r"did not finish the step in 0\.05 seconds"):
        world.wait(cast(torch.cuda.Event, Unfinished()))


def test_a_rank_that_died_is_named_before_the_step_has_had_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "_LOOK_SECONDS", 0.01)
    where, _ = json.loads(introduction())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        told = [
            introduction(),
            json.dumps([where, other.pid]).encode(),
            json.dumps(["another machine", 2**30]).encode(),
        ]
        neighbours = Neighbours(told, rank=0)
        neighbours.require_alive()
        other.kill()
    world = World(size=3)
    world._neighbours = neighbours
    with pytest.raises(RankFailedError, match="rank 1 died"):
        world.wait(cast(torch.cuda.Event, Unfinished()))


def test_what_nccl_says_last_is_told() -> None:
    message = "NCCL error in: a.cpp:9\nLast error:\nNo space left: /dev/shm/nccl"
    with (
        pytest.raises(DeviceError, match="NCCL failed on rank 2: No space left: /dev/shm/nccl"),
        World(rank=2, size=3)._watched(),
    ):
        raise DistBackendError(message)


def test_a_time_limit_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_RANK_TIMEOUT", "soon")
    with pytest.raises(UsageError, match="TIGHTFIT_RANK_TIMEOUT is 'soon'"):
        launch_ranks([sys.executable, "-c", "pass"], 2)


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
from tightfit.runtime.ranks.world import World
from tightfit.runtime.agreement import together
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


AGREEING = """
from dataclasses import replace
from tightfit.errors import UsageError
from tightfit.runtime.agreement import agreed
from tightfit.runtime.ranks.world import World
from runtime.ranks import options
world = World.from_environment()
mine = options(num_blocks=9 - world.rank)
assert agreed(mine, world).num_blocks == 8
try:
    agreed(replace(mine, max_num_seqs=3 + world.rank), world)
except UsageError as error:
    print(error.message, flush=True)
world.close()
"""


def test_ranks_agree_on_what_each_of_them_planned(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_ranks([sys.executable, "-c", AGREEING], 2, environment=ENVIRONMENT) == 0
    assert "max_num_seqs is 3 on rank 0, and 4 on rank 1" in capfd.readouterr().out


def test_all_ranks_learn_why_one_failed(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_ranks([sys.executable, "-c", FAILING], 2) == ExitCode.INPUT
    # Two processes write at once, so their lines may run into each other.
    printed = capfd.readouterr().out
    assert "rank 0: no tensor (shard again)" in printed
    assert "rank 1: no tensor (shard again)" in printed
