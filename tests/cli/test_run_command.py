"""`tightfit run` and `tightfit demo` as processes, on one rank and on two."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.cli import assert_error, tightfit
from support.work import write_shards
from tightfit.demo import tiny_checkpoint

pytestmark = pytest.mark.slow

SMALL = ("--max-model-len", "128", "--max-num-seqs", "2", "--max-num-batched-tokens", "64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "tp2"
    write_shards(model, out, 2)
    return out


def run_json(*arguments: str | Path) -> dict:
    done = tightfit("run", *arguments, *SMALL, "--json", "--max-tokens", "12")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_rank_and_two_and_rank_files_say_the_same(model: Path, shards: Path) -> None:
    prompts = ("--dtype", "float32", "-p", "Hello there", "-p", "One two three four")
    alone = run_json(model, *prompts)
    stages = run_json(model, "-pp", "2", *prompts)
    for other in (run_json(model, "-tp", "2", *prompts), stages, run_json(shards, *prompts)):
        assert other["completions"] == alone["completions"]
        assert len(other["ranks"]) == 2
    assert len(alone["completions"]) == 2
    assert alone["schema"] == 1


def test_the_document_has_planned_and_measured(model: Path) -> None:
    document = run_json(model, "--check")
    (rank,) = document["ranks"]
    measured = {c["name"]: c["measured_bytes"] for c in rank["components"]}
    for check in document["checks"]:
        assert check["ok"]
        assert (
            check["component"] == "total"
            or check["measured_bytes"] == (measured[check["component"]])
        )
    assert {c["component"] for c in document["checks"]} == {*measured, "total"}
    assert document["completions"] == []
    assert document["attention"] == []


def test_memory_unlike_the_plan_has_its_own_exit_code(model: Path) -> None:
    done = tightfit("run", model, *SMALL, "--check", "--tolerance", "0.0001")
    assert done.returncode == 4
    assert "differs from the plan: total of rank 0" in done.stdout
    quiet = tightfit("run", model, *SMALL, "--check", "--tolerance", "0.0001", "-q")
    assert (quiet.returncode, quiet.stdout) == (4, "")
    assert "total of rank 0: planned " in quiet.stderr


def test_text_is_printed_with_a_table(model: Path) -> None:
    done = tightfit("run", model, *SMALL, "-p", "Hello", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert "as planned: every component of each rank" in done.stdout
    assert "4 tokens in" in done.stdout


def test_under_a_torchrun_of_the_users_own(model: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["tightfit", "run", str(model), *SMALL, "--check", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["ranks"]) == 2


def test_files_of_stages_say_how_many_ranks_there_are(model: Path, tmp_path: Path) -> None:
    write_shards(model, tmp_path / "out", 1, pipeline_parallel_size=2)
    assert run_json(tmp_path / "out", "-p", "Hello")["completions"]
    done = tightfit(
        "run", tmp_path / "out", *SMALL, env=os.environ | {"RANK": "0", "WORLD_SIZE": "3"}
    )
    assert_error(
        done,
        2,
        "tensor parallel size 1 and 2 pipeline stages are 2 ranks, but torchrun started 3",
    )


def test_a_cache_of_fp8(model: Path) -> None:
    asked = ("--check", "--dtype", "float32", "--kv-cache-memory-bytes", "1MiB")
    narrow, wide = (run_json(model, *asked, "--kv-cache-dtype", word) for word in ("fp8", "auto"))
    for document, size in ((narrow, 1), (wide, 4)):
        (rank,) = document["ranks"]
        (cache,) = (c for c in rank["components"] if c["name"] == "kv_cache")
        assert cache["measured_bytes"] == pytest.approx(cache["planned_bytes"], rel=0.05)
        assert all(check["ok"] for check in document["checks"])
        assert 4 * document["kv_cache"]["bytes_per_block"] == (
            size * wide["kv_cache"]["bytes_per_block"]
        )
    assert narrow["kv_cache"]["dtype"] == "F8_E4M3"


def test_two_nodes_say_what_one_rank_says(model: Path, shards: Path) -> None:
    asked = ("--dtype", "float32", "-p", "Hello there", "--max-tokens", "12", *SMALL, "--json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--nproc-per-node", "1", "--node-rank", str(node)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += ["-m", "tightfit", "run", str(shards), *asked]
        pipe = subprocess.PIPE
        nodes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True))
    (first, errors), (second, _) = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert second == ""
    answer, alone = json.loads(first), tightfit("run", model, *asked)
    assert answer["completions"] == json.loads(alone.stdout)["completions"]
    assert len(answer["ranks"]) == 2


def test_shards_of_another_size_are_refused(shards: Path) -> None:
    done = tightfit("run", shards, "-tp", "1")
    assert_error(done, 1, f"{shards} was sharded for tensor parallel size 2, not 1")


def test_a_size_that_does_not_divide_is_refused(model: Path) -> None:
    done = tightfit("run", model, "-tp", "3")
    assert_error(done, 2, "tensor parallel size 3 does not divide num_attention_heads = 8")


def test_what_does_not_fit_is_not_started(model: Path) -> None:
    done = tightfit("run", model, "--kv-cache-memory-bytes", "1KB", "--max-model-len", "128")
    assert done.returncode == 1
    assert done.stderr.startswith("does not fit: ")


def test_a_damaged_rank_file_is_named(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    file = damaged / "model-rank-1-part-0.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    done = tightfit("run", damaged, *SMALL)
    assert done.returncode == 1
    assert "model-rank-1-part-0.safetensors" in done.stderr
    assert done.stderr.count("error: ") == 1


def test_a_missing_package_is_named(model: Path, tmp_path: Path) -> None:
    hide = tmp_path / "sitecustomize.py"
    hide.write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
    )
    done = tightfit("run", model, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert_error(done, 2, "`tightfit run` needs the package 'torch', which is not installed")
    assert "pip install 'tightfit[runtime]'" in done.stderr


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids of the ranks that a launcher has started, by rank."""
    found: dict[int, int] = {}
    for directory in Path("/proc").iterdir():
        try:
            status = (directory / "status").read_text()
            environment = (directory / "environ").read_bytes()
        except (OSError, ValueError):
            continue
        parent = re.search(r"^PPid:\t(\d+)$", status, re.MULTILINE)
        rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", environment)
        if parent and rank and int(parent[1]) == launcher:
            found[int(rank[1])] = int(directory.name)
    return found


@pytest.fixture
def endless(model: Path) -> subprocess.Popen[str]:
    """A run on two ranks that is in the middle of its answer."""
    command = [sys.executable, "-m", "tightfit", "run", str(model), "-tp", "2", "-p", "Hello"]
    command += ["--max-model-len", "2048", "--max-tokens", "2000", "--temperature", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(1)
    return process


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def assert_all_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "a rank outlived the command"
        time.sleep(0.1)


def test_a_dead_rank_ends_the_run(endless: subprocess.Popen[str]) -> None:
    ranks = ranks_of(endless.pid)
    os.kill(ranks[1], signal.SIGKILL)
    started = time.monotonic()
    _, errors = endless.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert endless.returncode == 1
    assert "error: rank 1 died (SIGKILL)" in errors
    assert "Traceback" not in errors
    assert_all_gone(list(ranks.values()))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nobody(
    endless: subprocess.Popen[str], how: signal.Signals
) -> None:
    ranks = ranks_of(endless.pid)
    endless.send_signal(how)
    _, errors = endless.communicate(timeout=60)
    assert endless.returncode == 130, errors
    assert errors.strip() == "interrupted"
    assert_all_gone(list(ranks.values()))


def test_a_killed_launcher_leaves_nobody(endless: subprocess.Popen[str]) -> None:
    ranks = ranks_of(endless.pid)
    assert len(ranks) == 2
    endless.kill()
    assert_all_gone(list(ranks.values()))


def test_the_tiny_demo_needs_no_network() -> None:
    done = tightfit("demo", "--tiny")
    assert done.returncode == 0, done.stderr
    for step in ("Plan it", "Prepare it", "Verify it", "Prove that it fits"):
        assert f"== {step}: tightfit " in done.stdout
    assert "tiny, invented and untrained" in done.stdout
    assert "every byte as in its source" in done.stdout
    assert "as planned: every component of each rank" in done.stdout


def test_attention_backends_are_for_gpus(model: Path) -> None:
    done = tightfit("run", model, "--device", "cpu", "--attention-backend", "triton")
    assert_error(done, 2, "--attention-backend triton, but attention on a CPU is PyTorch's")
