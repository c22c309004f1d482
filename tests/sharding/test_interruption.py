"""Whatever stops `shard`, no output is left that looks whole, and the source is untouched."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.header import encode_header
from tightfit.cli.output import NoProgress
from tightfit.model.families import model_spec
from tightfit.model.sources import source_shapes
from tightfit.model.stored import stored_layout
from tightfit.sharding.shard import ShardJob, prepare, shard


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def make_job(model: Path) -> ShardJob:
    return prepare(
        open_checkpoint(str(model)),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=2,
        max_shard_bytes=10**6,
    )


class Interrupted(NoProgress):
    """Ctrl-C once `share` of the work of a phase is done."""

    def __init__(self, phase: str, share: float) -> None:
        self.wanted, self.share = phase, share
        self.left = 2.0**60

    def phase(self, name: str, total_bytes: int) -> None:
        if name == self.wanted:
            self.left = self.share * total_bytes
            self.advance(0)

    def advance(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_interrupted(share: float, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = tiny_model("llama_bias"), tmp_path / "deep" / "out"
    before = digests(model)
    with pytest.raises(KeyboardInterrupt):
        shard(make_job(model), out, Interrupted("copying", share))
    assert list(tmp_path.iterdir()) == []
    assert digests(model) == before
    # And the very next attempt works.
    shard(make_job(model), out, NoProgress())
    assert (out / "tightfit-manifest.json").exists()


@pytest.mark.parametrize("existing", ["config.json", "tightfit-manifest.json"])
def test_what_is_there_already_stays(
    existing: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from tightfit.errors import OutputError

    (tmp_path / existing).write_text("mine")
    with pytest.raises(OutputError):
        shard(make_job(tiny_model("llama")), tmp_path, NoProgress())
    assert [p.name for p in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "mine"


@pytest.fixture(scope="module")
def sparse_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 450 MB of holes: real to every reader, and made at once."""
    directory = tmp_path_factory.mktemp("sparse")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": 2,
        "vocab_size": 16_384,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = source_shapes(model_spec(config))
    sizes = {name: 2 * shape[0] * (shape[1:] or (1,))[0] for name, shape in shapes.items()}
    header = encode_header([(name, "BF16", shapes[name], sizes[name]) for name in shapes])
    path = directory / "model.safetensors"
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(sizes.values()))
    return directory


def state(directory: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in directory.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number: signal.Signals, sparse_model: Path, tmp_path: Path) -> None:
    before = state(sparse_model)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "tightfit", "shard", sparse_model, out, "-tp", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    # The files have their names from the start of the copies.
    while len(list(out.glob("*.safetensors.partial"))) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []
    assert state(sparse_model) == before


def test_no_space(sparse_model: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: both stop a write in the middle."""
    before = state(sparse_model)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))

    out = tmp_path / "out"
    command = [sys.executable, "-m", "tightfit", "shard", sparse_model, out, "-tp", "2"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 2
    error, hint = done.stderr.splitlines()
    assert error.startswith(f"error: cannot write {tmp_path / 'out'}")
    assert "--max-shard-size" in hint
    assert list(tmp_path.iterdir()) == []
    assert state(sparse_model) == before
    again = subprocess.run(
        [*command, "--max-shard-size", "40MB", "--json"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (70_000_000, 70_000_000)),
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["written"] is True


def test_no_permission(sparse_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "tightfit", "shard", sparse_model, tmp_path / "file" / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write ")
    assert "Traceback" not in done.stderr
