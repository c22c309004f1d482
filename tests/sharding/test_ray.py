"""A real Ray cluster of two nodes, of which one dies, or is cut off, half-way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.cli import assert_error, tightfit
from support.interrupted import digests, write
from support.spreading import Number, make_job, spread, work
from tightfit.cli.output import NoProgress
from tightfit.errors import CheckpointError, TaskLostError
from tightfit.executors import open_executor
from tightfit.sharding.shard import shard

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

TinyModel = Callable[[str], Path]
RUN = "from support.spreading import main; main()"
TESTS = Path(__file__).parents[1]
NODE = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 4,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        found = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": HEALTH})
        try:
            yield found
        finally:
            found.shutdown()


@pytest.fixture
def second(cluster: Any) -> Iterator[Any]:
    node = cluster.add_node(**NODE)
    yield node
    if node.any_processes_alive():
        cluster.remove_node(node, allow_graceful=False)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_writing(pid: int) -> bool:
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if ".attempts.partial/" in os.readlink(link):
                    return True
    return False


class Disturb(NoProgress):
    """Does something when a share of the bytes is written."""

    def __init__(self, disturb: Callable[[], None], share: float = 0.4) -> None:
        self.disturb: Callable[[], None] | None = disturb
        self.share, self.total, self.done = share, 2**60, 0

    def phase(self, name: str, total_bytes: int) -> None:
        self.total, self.done = total_bytes, 0

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.disturb is not None and self.done > self.share * self.total:
            disturb, self.disturb = self.disturb, None
            disturb()


@pytest.mark.parametrize("end", ["killed", "cut off"])
def test_a_node_is_lost(
    end: str, cluster: Any, second: Any, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    raylet = second.all_processes["raylet"][0].process.pid
    workers: list[int] = []
    stopped: list[int] = []

    def disturb() -> None:
        while not (writing := [pid for pid in children(raylet) if is_writing(pid)]):
            time.sleep(0.001)
        workers.extend(writing)
        stopped.extend(children(raylet))
        for pid in stopped:
            os.kill(pid, signal.SIGKILL if end == "killed" else signal.SIGSTOP)
        os.kill(raylet, signal.SIGKILL)

    notices: list[str] = []
    bars = Disturb(disturb)
    with open_executor(
        "ray", "shard", ray_address=cluster.address, notice=notices.append
    ) as executor:
        spread(model, out, executor, bars)
        assert workers
        assert bars.done == bars.total
        # Who was cut off before it was heard of cannot be told from one that waits.
        assert notices or end == "cut off"
        for notice in notices:
            assert notice.startswith("model-rank-")
            assert " was lost, as its worker " in notice
        write(model, tmp_path / "whole")
        assert digests(out) == digests(tmp_path / "whole")
        if end == "cut off":
            # They go on where they were, and find nothing that they could damage.
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            time.sleep(1)
            assert digests(out) == digests(tmp_path / "whole")
            for pid in stopped:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def start(model: Path, out: Path, cluster: Any, how: str) -> "subprocess.Popen[str]":
    """A driver of its own, when it has done a third of its parts."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, model, out, cluster.address, how],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    count = len(make_job(model).parts)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.safetensors.partial"))) < count // 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_the_driver_is_killed(cluster: Any, tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    write(model, tmp_path / "whole")
    process = start(model, out, cluster, "shard")
    process.kill()
    process.communicate()
    assert not (out / "tightfit-manifest.json").exists()
    done = tightfit("shard", model, out, "-tp", "2", "--max-shard-size", "1MiB")
    assert done.returncode == 2
    assert "holds an unfinished output" in done.stderr
    there = {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors.partial")}
    here = Path(shutil.copytree(out, tmp_path / "here"))
    spread(model, here, None, NoProgress(), resume=True)
    assert digests(here) == digests(tmp_path / "whole")
    with open_executor("ray", "shard", ray_address=cluster.address, notice=print) as executor:
        spread(model, out, executor, NoProgress(), resume=True)
    assert digests(out) == digests(tmp_path / "whole")
    kept = [n for n, t in there.items() if (out / n[:-8]).stat().st_mtime_ns == t]
    # But for the one that may have come without its note.
    assert len(kept) >= len(there) - 1 > 0


def test_interrupted(cluster: Any, tiny_model: TinyModel, tmp_path: Path) -> None:
    process = start(tiny_model("llama"), tmp_path / "out", cluster, "shard")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (130, "", "")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_tasks(cluster: Any, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    job = make_job(model, seconds=0)
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)
    notices: list[str] = []
    with open_executor(
        "ray", "shard", ray_address=cluster.address, notice=notices.append
    ) as executor:
        assert executor is not None
        with pytest.raises(CheckpointError) as e:
            shard(job, tmp_path / "out", NoProgress(), executor=executor)
        assert "(node " in e.value.message
        assert "model.safetensors is truncated: byte" in e.value.message
        assert e.value.hint is not None
        assert not (tmp_path / "out").exists()
        found: dict[int, int] = {}
        seen: list[int] = []
        numbers = [Number("one", 1), Number("two", 2), Number("three", 3)]
        executor.run(work, 7, numbers, done=found.__setitem__, advance=seen.append)
        assert found == {0: 7, 1: 14, 2: 21}
        assert sum(seen) == 3
        with pytest.raises(TaskLostError) as lost:
            executor.run(work, 7, [Number("bad", -1)], done=found.__setitem__, advance=seen.append)
        assert lost.value.message.startswith("bad was given up: it was lost with 4 workers")
        assert [notice[:12] for notice in notices] == ["bad was lost"] * 3
        assert sum(seen) == 3


def test_the_command(cluster: Any, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    options = ("-tp", "2", "--max-shard-size", "1MiB")
    assert tightfit("shard", model, tmp_path / "whole", *options).returncode == 0
    ray = ("--executor", "ray", "--ray-address")
    # Relative paths mean the same everywhere.
    done = tightfit("shard", model, "out", *options, *ray, cluster.address, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["written"] is True
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    done = tightfit("shard", model, tmp_path / "no", *ray, "nowhere.invalid")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot use a Ray cluster at nowhere.invalid: ")


def test_nobody_answers(tiny_model: TinyModel, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        options = ("-tp", "2", "--executor", "ray", "--ray-address", address)
        done = tightfit("shard", tiny_model("llama"), tmp_path / "out", *options)
    assert_error(done, 2, f"cannot use a Ray cluster at {address}: [Errno 111] Connection refused")
    assert not (tmp_path / "out").exists()
