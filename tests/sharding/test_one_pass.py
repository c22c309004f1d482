"""One pass over the source: what is read, how it is written, and that nothing is after a stop."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from support.interrupted import digests, write
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.header import encode_header
from tightfit.model.families import model_spec
from tightfit.model.sources import source_shapes
from tightfit.model.stored import stored_layout
from tightfit.sharding.shard import prepare
from tightfit.sharding.stream import carry, turns, written
from tightfit.sharding.stream.crew import Crew
from tightfit.sharding.stream.pending import Pending
from tightfit.sharding.stream.source_files import Batch, SourceFiles
from tightfit.sharding.stream.written import Stopped, Target, Writer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 MB of random weights: enough for blocks, pages, and writes past the page cache."""
    directory = tmp_path_factory.mktemp("random")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 2000,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = source_shapes(model_spec(config))
    sizes = {name: 2 * shape[0] * (shape[1:] or (1,))[0] for name, shape in shapes.items()}
    header = encode_header([(name, "BF16", shapes[name], sizes[name]) for name in shapes])
    data = os.urandom(sum(sizes.values()))
    (directory / "model.safetensors").write_bytes(header + data)
    return directory


def can_write_directly(directory: Path) -> bool:
    with open(directory / "probe", "w+b") as file:
        target = Target(file.fileno())
        found = target._direct >= 0
        target.close()
    return found


def test_past_the_page_cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_write_directly(tmp_path):
        pytest.skip("this file system cannot write past the page cache")
    with monkeypatch.context() as patch:
        patch.setattr(written, "_open_direct", lambda fd: -1)
        write(model, tmp_path / "cached", 4, max_shard_bytes=10**9)
    direct: set[int] = set()
    opened = written._open_direct

    def remember(fd: int) -> int:
        direct.add(found := opened(fd))
        return found

    monkeypatch.setattr(written, "_open_direct", remember)
    sizes: Counter[bool] = Counter()
    real, refused = os.pwrite, True

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if fd in direct and refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        sizes[fd in direct] += len(data)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    write(model, tmp_path / "refused", 4, max_shard_bytes=10**9)
    assert sizes[True] == 0
    refused = False
    write(model, tmp_path / "direct", 4, max_shard_bytes=10**9)
    assert sizes[True] > 15_000_000
    cached = digests(tmp_path / "cached")
    assert digests(tmp_path / "refused") == cached
    assert digests(tmp_path / "direct") == cached


@pytest.mark.parametrize("size", [2, 4])
def test_every_byte_is_read_once(
    size: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, ranges = threading.Lock(), []
    real = SourceFiles.read_into

    def read_into(self: SourceFiles, file: str, batches: Iterable[Batch], start: int) -> None:
        batches = list(batches)
        with lock:
            ranges.append((start, start + sum(nbytes for _, nbytes in batches)))
        real(self, file, batches, start)

    monkeypatch.setattr(SourceFiles, "read_into", read_into)
    write(model, tmp_path / "out", size)
    ranges.sort()
    infos = open_checkpoint(str(model)).tensors().values()
    assert ranges[0][0] == min(info.offset for info in infos)
    assert ranges[-1][1] == max(info.offset + info.nbytes for info in infos)
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


def test_without_numpy(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> None:
    """What is turned is the same, in whatever blocks."""
    write(tiny_model("gpt2"), tmp_path / "one", 2)
    monkeypatch.setattr(turns, "_WORTH_NUMPY", 1)
    write(tiny_model("gpt2"), tmp_path / "numpy", 2)
    monkeypatch.setattr(turns, "_numpy", lambda: None)
    monkeypatch.setattr(carry, "BUFFER_BYTES", 1000)
    write(tiny_model("gpt2"), tmp_path / "small", 2)
    assert digests(tmp_path / "one") == digests(tmp_path / "numpy") == digests(tmp_path / "small")


def test_tasks_share_no_tensor(model: Path) -> None:
    job = prepare(
        open_checkpoint(str(model)),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=2,
        max_shard_bytes=10**9,
    )
    pending = Pending(job.parts, job.copies, job.gathers, ())
    tasks = pending.tasks()
    keys = [key for task in tasks for key in task.keys]
    rest = list(pending.without_source())
    assert len({*keys, *rest}) == len(keys) + len(rest)
    assert len(keys) + len(rest) == sum(len(part.placed) for part in job.parts)
    assert sum(task.nbytes for task in tasks) == job.copied_bytes
    assert [task.nbytes for task in tasks] == sorted((t.nbytes for t in tasks), reverse=True)
    names = [[unit.source.name for unit in task.units] for task in tasks]  # type: ignore[union-attr]
    prefix = "model.layers.1.self_attn"
    assert [f"{prefix}.{one}_proj.weight" for one in "qkv"] in names


def test_nothing_is_written_after_a_stop(model: Path, tmp_path: Path) -> None:
    job = prepare(
        open_checkpoint(str(model)),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=1,
        max_shard_bytes=10**9,
    )
    (part,) = job.parts
    path = tmp_path / "part"
    path.write_bytes(bytes(part.nbytes))
    with open(path, "r+b") as file:
        pending = Pending(job.parts, job.copies, job.gathers, ())
        writer = Writer([Target(file.fileno())], pending, lambda nbytes: None)
        offset = part.placed[0].offset
        writer.put(0, offset, memoryview(b"abcd"), aligned=False)
        writer.stop()
        for attempt in (
            lambda: writer.put(0, offset, memoryview(b"efgh"), aligned=False),
            lambda: writer.put_lines(0, offset, 8, memoryview(b"efgh"), 2),
            lambda: writer.checksum((0, 0)),
        ):
            with pytest.raises(Stopped):
                attempt()
    assert path.read_bytes()[offset : offset + 4] == b"abcd"


class Working:
    """Waits in its task until it is told to stop, or fails."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def do(self, task: str) -> str:
        if task == "fail":
            raise OSError(errno.ENOSPC, "No space left on device")
        if task == "wait":
            assert self.stopped.wait(30)
        return task

    def stop(self) -> None:
        self.stopped.set()


def test_an_error_stops_all() -> None:
    crew: Crew[str, str] = Crew()
    members: list[Working] = []

    def make() -> Working:
        members.append(Working())
        return members[-1]

    with pytest.raises(OSError, match="No space"), crew.working(["wait", "wait", "fail"], make):
        assert list(crew.results(lambda nbytes: None)) == []
    assert len(members) == 3
    assert all(member.stopped.is_set() for member in members)
    assert not [thread for thread in crew._threads if thread.is_alive()]


def test_all_results_arrive() -> None:
    crew: Crew[str, str] = Crew()
    done: list[int] = []

    class Telling(Working):
        def do(self, task: str) -> str:
            crew.advance(3)
            return task

    with crew.working([str(i) for i in range(100)], Telling):
        assert sorted(crew.results(done.append), key=int) == [str(i) for i in range(100)]
    assert done == [3] * 100


def test_memory_does_not_depend_on_the_model(tmp_path: Path) -> None:
    """2 GB of holes, of which one rank of 16 is written; the peak is that of a process alone."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 4096,
        "intermediate_size": 16_384,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 3,
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
    }
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    shapes = source_shapes(model_spec(config))
    sizes = {name: 2 * shape[0] * (shape[1:] or (1,))[0] for name, shape in shapes.items()}
    assert sum(sizes.values()) > 1.9 * 10**9
    header = encode_header([(name, "BF16", shapes[name], sizes[name]) for name in shapes])
    (model / "model.safetensors").write_bytes(header)
    os.truncate(model / "model.safetensors", len(header) + sum(sizes.values()))
    code = (
        "import sys; from tightfit.cli.main import main\n"
        "try: main()\n"
        "finally: print(*(x for x in open('/proc/self/status') if 'VmHWM' in x), file=sys.stderr)"
    )
    words = ["shard", str(model), str(tmp_path / "out"), "-tp", "16", "--ranks", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    (line,) = (line for line in done.stderr.splitlines() if "VmHWM" in line)
    assert int(line.split()[1]) < 150_000, line
