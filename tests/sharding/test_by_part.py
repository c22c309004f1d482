"""Files that are written in order have the bytes of those that are written anywhere."""

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.files import MANIFEST
from tightfit.cli.output import NoProgress
from tightfit.model.stored import stored_layout
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.shard import ShardJob, prepare, shard
from tightfit.sharding.stream import by_part, windows
from tightfit.sharding.stream.by_part import plan_parts, write_part, write_parts
from tightfit.sharding.stream.source_files import SourceFiles

TinyModel = Callable[[str], Path]


def job_of(model: Path, size: int, layout: str = "vllm-0.32") -> ShardJob:
    return prepare(
        open_checkpoint(str(model)),
        stored_layout(layout),
        tensor_parallel_size=size,
        max_shard_bytes=3 * 10**5,
    )


class Counted(SourceFiles):
    """Remembers what was read."""

    def read(self, file: str, start: int, stop: int) -> bytes:
        self.ranges = [*getattr(self, "ranges", []), (file, start, stop)]
        return super().read(file, start, stop)


def written(job: ShardJob) -> tuple[dict[str, bytes], dict[tuple[str, str], str]]:
    files: dict[str, bytes] = {}
    checksums: dict[tuple[str, str], str] = {}
    with SourceFiles(job.checkpoint.source) as sources:
        for work in plan_parts(job):
            sink = io.BytesIO()
            # As for another process.
            work = pickle.loads(pickle.dumps(work))
            found = write_part(work, sources, sink, NoProgress())
            files[work.part.name] = sink.getvalue()
            checksums |= {(work.part.name, name): digest for name, digest in found.items()}
    return files, checksums


def check(job: ShardJob, out: Path) -> None:
    shard(job, out, NoProgress())
    files, checksums = written(job)
    expected = {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
    assert {n: hashlib.sha256(d).hexdigest() for n, d in files.items()} == {
        n: hashlib.sha256(d).hexdigest() for n, d in expected.items() if n in files
    }
    assert (out / MANIFEST).exists()
    stored = {(f.name, t.name): t.xxh3 for f in read_manifest(out).files for t in f.tensors}
    assert checksums == stored


@pytest.fixture(params=["as it is", "tiny windows"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "tiny windows":
        monkeypatch.setattr(by_part, "WINDOW_BYTES", 5 * 2**10 + 8)
        monkeypatch.setattr(by_part, "TURNED_WINDOW_BYTES", 7 * 2**10)
        monkeypatch.setattr(windows, "READ_BYTES", 3000)
        monkeypatch.setattr(windows, "NEAR_BYTES", 200)
    return str(request.param)


@pytest.mark.parametrize("model", ["llama_bias", "gpt2", "jamba", "qwen3_moe", "mamba2"])
def test_same_bytes(model: str, sizes: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    check(job_of(tiny_model(model), 2), tmp_path / "out")


@pytest.mark.parametrize("model", ["llama", "gpt2", "jamba", "qwen3_moe"])
def test_same_bytes_cut_again(
    model: str, sizes: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    shard(job_of(tiny_model(model), 4), tmp_path / "four", NoProgress())
    check(job_of(tmp_path / "four", 2), tmp_path / "two")
    check(job_of(tmp_path / "two", 4), tmp_path / "four again")


def test_uneven_ranks(sizes: str, odd_model: Path, tmp_path: Path) -> None:
    check(job_of(odd_model, 3, "builtin"), tmp_path / "out")


def test_ranks_in_step_read_rows_once(tiny_model: TinyModel) -> None:
    job = job_of(tiny_model("llama"), 4)
    works = [w for w in plan_parts(job) if w.part.name.endswith("-part-0.safetensors")]
    assert len(works) == 4
    sinks = [io.BytesIO() for _ in works]
    with Counted(job.checkpoint.source) as files:
        write_parts(works, files, sinks, NoProgress())
        together = sum(stop - start for _, start, stop in files.ranges)
    copied = sum(len(sink.getvalue()) for sink in sinks)
    assert together < 1.1 * copied
