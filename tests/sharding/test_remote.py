"""`shard` to and from distant stores: a real S3 server, and fsspec's own memory."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.s3_server import S3, running_s3
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import OutputError
from tightfit.model.stored import stored_layout
from tightfit.sharding.manifest import Manifest
from tightfit.sharding.merge import merge, prepare_merge
from tightfit.sharding.remote import upload
from tightfit.sharding.remote.plain import write_to
from tightfit.sharding.remote.upload import shard_to
from tightfit.sharding.shard import ShardJob, prepare, shard
from tightfit.sharding.stream import by_part

TinyModel = Callable[[str], Path]
Digests = dict[str, str]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture
def bucket(s3: S3, request: pytest.FixtureRequest) -> str:
    name = hashlib.sha1(request.node.nodeid.encode()).hexdigest()[:20]
    return s3.bucket(name)


def job_of(model: Path | str, size: int = 2, **options: Any) -> ShardJob:
    return prepare(
        open_checkpoint(str(model)),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=size,
        max_shard_bytes=options.pop("max_shard_bytes", 10**5),
        **options,
    )


def digests(directory: Path) -> Digests:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def stored(s3: S3, bucket: str, prefix: str = "out/") -> Digests:
    return {
        key: hashlib.sha256(s3.get(bucket, prefix + key)).hexdigest()
        for key in s3.keys(bucket, prefix)
    }


def expected(model: Path, out: Path, size: int = 2) -> Digests:
    shard(job_of(model, size), out, NoProgress())
    return digests(out)


def write(model: Path | str, url: str, size: int = 2, **options: Any) -> Manifest:
    resume = options.pop("resume", False)
    bars = options.pop("bars", NoProgress())
    return shard_to(job_of(model, size, **options), url, bars, resume=resume).manifest


@pytest.mark.parametrize("model", ["llama", "jamba"])
def test_same_as_local(
    model: str, s3: S3, bucket: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model(model)
    write(source, f"s3://{bucket}/out")
    assert stored(s3, bucket) == expected(source, tmp_path / "out")
    assert s3.uploads(bucket) == []


def test_memory(tiny_model: TinyModel, tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    source = tiny_model("llama")
    write(source, "memory://out/deep")
    fs = MemoryFileSystem()
    found = {n.rsplit("/", 1)[1]: fs.cat_file(n) for n in fs.find("/out/deep")}
    fs.rm("/out", recursive=True)
    assert {n: hashlib.sha256(d).hexdigest() for n, d in found.items()} == expected(
        source, tmp_path / "out"
    )


class Stop(NoProgress):
    """Ctrl-C after a share of the upload."""

    def __init__(self, share: float) -> None:
        self.share, self.left = share, 2.0**60
        self.totals: dict[str, int] = {}

    def phase(self, name: str, total_bytes: int) -> None:
        self.totals[name] = total_bytes
        if name == "uploading":
            self.left = self.share * total_bytes

    def advance(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            raise KeyboardInterrupt


def test_interrupted(
    s3: S3, bucket: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, url = tiny_model("llama"), f"s3://{bucket}/out"
    said: list[str] = []
    monkeypatch.setattr(by_part, "WINDOW_BYTES", 2**14)
    monkeypatch.setattr(upload, "PARTS_AT_A_TIME", 4)
    job = job_of(source, 4)
    bars = Stop(0.8)
    with pytest.raises(KeyboardInterrupt):
        shard_to(job, url, bars, notice=said.append)
    total = bars.totals["uploading"]
    there = s3.keys(bucket, "out/")
    complete = {key for key in there if key.endswith(".safetensors")}
    assert "tightfit-manifest.json" not in there
    assert 0 < len(complete) < len(job.parts)
    ranks = {name: name.split("-")[2] for name in complete}
    assert {f"tightfit-rank-{ranks[n]}-{n}.json" for n in complete} == there - complete
    assert said == [
        f"{len(complete)} of {len(job.parts)} files are complete in {url}, and the same command "
        "with --resume goes on"
    ]
    assert s3.uploads(bucket) == []
    with pytest.raises(OutputError, match="holds an unfinished output"):
        write(source, url, 4)
    with pytest.raises(OutputError, match="--tensor-parallel-size was 4, and is 2"):
        write(source, url, 2, resume=True)
    bars = Stop(2.0)
    write(source, url, 4, resume=True, bars=bars)
    assert bars.totals["uploading"] == total - sum(
        part.nbytes for part in job.parts if part.name in complete
    )
    assert stored(s3, bucket) == expected(source, tmp_path / "out", 4)
    bars = Stop(2.0)
    write(source, url, 4, resume=True, bars=bars)
    assert bars.totals == {}
    with pytest.raises(OutputError, match="is not empty"):
        write(source, url, 4)


def test_an_interrupted_merge(
    s3: S3, bucket: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_part, "WINDOW_BYTES", 2**14)
    monkeypatch.setattr(upload, "PARTS_AT_A_TIME", 2)
    shard(job_of(tiny_model("llama"), 4), tmp_path / "four", NoProgress())
    job = prepare_merge(open_checkpoint(str(tmp_path / "four")), max_shard_bytes=10**5)
    url = f"s3://{bucket}/out"
    with pytest.raises(KeyboardInterrupt):
        write_to(job, url, Stop(0.7))
    there = s3.keys(bucket, "out/")
    complete = {key for key in there if key.endswith(".safetensors")}
    assert complete
    assert "config.json" not in there
    with pytest.raises(OutputError, match="holds an unfinished output"):
        write_to(job, url, NoProgress())
    bars = Stop(2.0)
    write_to(job, url, bars, resume=True)
    left = [part.nbytes for part in job.parts if part.name not in complete]
    assert bars.totals["uploading"] == sum(left)
    merge(job, tmp_path / "merged", NoProgress())
    assert stored(s3, bucket) == digests(tmp_path / "merged")


def test_what_somebody_replaced_is_sent_again(
    s3: S3, bucket: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, url = tiny_model("llama"), f"s3://{bucket}/out"
    monkeypatch.setattr(by_part, "WINDOW_BYTES", 2**14)
    monkeypatch.setattr(upload, "PARTS_AT_A_TIME", 4)
    with pytest.raises(KeyboardInterrupt):
        write(source, url, 4, bars=Stop(0.8))
    name = next(key for key in s3.keys(bucket, "out/") if key.endswith(".safetensors"))
    s3.put(bucket, f"out/{name}", bytes(len(s3.get(bucket, f"out/{name}"))))
    write(source, url, 4, resume=True)
    assert stored(s3, bucket) == expected(source, tmp_path / "out", 4)


def test_ranks_by_parts(s3: S3, bucket: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source, url = tiny_model("jamba"), f"s3://{bucket}/out"
    assert write(source, url, 4, ranks={2}).missing_ranks == (0, 1, 3)
    assert write(source, url, 4, ranks={0, 3}).missing_ranks == (1,)
    assert "tightfit-manifest.json" not in s3.keys(bucket, "out/")
    with pytest.raises(OutputError, match="already has rank 2"):
        write(source, url, 4, ranks={1, 2})
    assert write(source, url, 4, ranks={1}).missing_ranks == ()
    assert stored(s3, bucket) == expected(source, tmp_path / "out", 4)


def test_foreign_files_and_places(s3: S3, bucket: str, tiny_model: TinyModel) -> None:
    s3.put(bucket, "out/notes.txt", b"mine")
    with pytest.raises(OutputError, match="is not empty"):
        write(tiny_model("llama"), f"s3://{bucket}/out", resume=True)
    assert s3.keys(bucket) == {"out/notes.txt"}
