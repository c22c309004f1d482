"""Models that are elsewhere: only what is needed is fetched, whatever the server does."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.cli import tightfit
from support.file_server import FileServer
from support.hub_server import HubServer
from support.random_llama import make_random_llama
from tightfit.checkpoint import store
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.remote_source import FsspecSource
from tightfit.cli.output import NoProgress
from tightfit.errors import CheckpointError, VerificationError
from tightfit.model.stored import stored_layout
from tightfit.sharding.merge import merge, prepare_merge
from tightfit.sharding.proof.verify import verify
from tightfit.sharding.remote.upload import shard_to
from tightfit.sharding.shard import ShardJob, prepare, shard
from tightfit.sharding.stream.windows import NEAR_BYTES

TinyModel = Callable[[str], Path]
pytest.importorskip("aiohttp")


def job_of(model: Path | str, size: int, ranks: set[int] | None = None) -> ShardJob:
    return prepare(
        open_checkpoint(str(model)),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=size,
        max_shard_bytes=10**6,
        ranks=ranks,
    )


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(store, "FIRST_WAIT_SECONDS", 0.01)
    (tmp_path / "web").mkdir()
    with FileServer(tmp_path / "web") as server:
        yield server


def uneven_fetches(job: ShardJob) -> int:
    """Bytes of whole rows of which a rank takes slices that are near each other."""
    extra = 0
    for group in job.copies:
        for copy in group.copies:
            if copy.rows > 1 and copy.source_stride - copy.row_bytes < NEAR_BYTES:
                extra += (copy.rows - 1) * (copy.source_stride - copy.row_bytes)
    return extra


@pytest.mark.parametrize("sink", ["local", "memory"])
def test_a_rank_fetches_what_it_needs(sink: str, web: FileServer, tmp_path: Path) -> None:
    make_random_llama(web.directory / "m", hidden=2048, layers=1, vocab=8192, sparse=True)
    job = job_of(f"{web.url}/m", 8, {0})
    whole = (web.directory / "m" / "model.safetensors").stat().st_size
    web.sent_bytes = 0
    if sink == "local":
        shard(job, tmp_path / "out", NoProgress())
    else:
        shard_to(job, "memory://counted", NoProgress())
    needed = job.copied_bytes + uneven_fetches(job)
    assert needed < whole / 2
    assert job.copied_bytes <= web.sent_bytes < 1.02 * needed


def test_long_rows_are_fetched_in_slices(web: FileServer) -> None:
    """Four rows of 1 MiB each: a rank of two fetches its halves only."""
    more = {"intermediate_size": 2**21, "num_attention_heads": 2, "num_key_value_heads": 2}
    make_random_llama(
        web.directory / "m", hidden=8, layers=1, vocab=64, sparse=True, head_dim=4, **more
    )
    job = job_of(f"{web.url}/m", 2, {1})
    web.sent_bytes = 0
    shard_to(job, "memory://slices", NoProgress())
    assert job.copied_bytes <= web.sent_bytes < 1.02 * job.copied_bytes


@pytest.mark.parametrize("trouble", ["failing", "breaking"])
def test_a_bad_server(trouble: str, web: FileServer, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("jamba")
    (web.directory / "m").symlink_to(model)
    setattr(web, trouble, 4)
    shard(job_of(f"{web.url}/m", 2), tmp_path / "out", NoProgress())
    web.failing = web.breaking = 0
    report = verify(tmp_path / "out", open_checkpoint(str(model)).config, NoProgress(), None)
    assert report.problems == ()
    shard(job_of(model, 2), tmp_path / "expected", NoProgress())
    found, expected = digests(tmp_path / "out"), digests(tmp_path / "expected")
    assert found.keys() == expected.keys()
    found.pop("tightfit-manifest.json")
    assert found.items() <= expected.items()


def test_a_source_that_changes(web: FileServer, tiny_model: TinyModel) -> None:
    data = (tiny_model("llama") / "model.safetensors").read_bytes()
    model = web.directory / "m"
    model.mkdir()
    (model / "config.json").write_bytes((tiny_model("llama") / "config.json").read_bytes())
    (model / "model.safetensors").write_bytes(data)

    class Meanwhile(NoProgress):
        def advance(self, nbytes: int) -> None:
            (model / "model.safetensors").write_bytes(data)

    with pytest.raises(CheckpointError, match="changed while it was read"):
        shard_to(job_of(f"{web.url}/m", 2), "memory://changed", Meanwhile())
    assert not FsspecSource("memory://changed").exists("tightfit-manifest.json")


def test_a_rank_of_a_sharded_source(web: FileServer, tmp_path: Path) -> None:
    """Twice what it holds: once to check it, and once to copy it; and nothing of other ranks."""
    model = make_random_llama(tmp_path / "m", hidden=512, layers=4, vocab=8192)
    shard(job_of(model, 8), web.directory / "eight", NoProgress())
    job = job_of(f"{web.url}/eight", 4, {1})
    web.sent_bytes = 0
    shard(job, tmp_path / "out", NoProgress())
    assert web.sent_bytes < 2.1 * job.copied_bytes
    shard(job_of(model, 4, {1}), tmp_path / "expected", NoProgress())
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


@pytest.mark.parametrize("model", ["llama", "gpt2", "jamba"])
def test_sharded_sources(
    model: str, web: FileServer, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """To verify, to cut again, and to merge them, without a copy here."""
    plain = tiny_model(model)
    shard(job_of(plain, 4), web.directory / "four", NoProgress())
    config = open_checkpoint(str(plain)).config
    url = f"{web.url}/four"
    there = FsspecSource(url)
    assert verify(there, config, NoProgress(), open_checkpoint(str(plain))).problems == ()
    shard(job_of(url, 2), tmp_path / "two", NoProgress())
    shard(job_of(plain, 2), tmp_path / "expected", NoProgress())
    assert digests(tmp_path / "two") == digests(tmp_path / "expected")
    merge(prepare_merge(open_checkpoint(url), max_shard_bytes=10**9), tmp_path / "m", NoProgress())
    merged = open_checkpoint(str(tmp_path / "m"))
    source = open_checkpoint(str(plain))
    for name, info in source.tensors().items():
        found = merged.tensors()[name]
        assert merged.source.read(found.file, found.offset, found.offset + found.nbytes) == (
            source.source.read(info.file, info.offset, info.offset + info.nbytes)
        )

    damaged = web.directory / "four" / "model-rank-1-part-0.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert len(verify(FsspecSource(url), config, NoProgress(), None).problems) == 1
    with pytest.raises(VerificationError, match="is damaged"):
        shard(job_of(url, 2), tmp_path / "damaged", NoProgress())


def test_ranks_of_a_model_on_the_hub(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = make_random_llama(tmp_path / "m", hidden=512, layers=2, vocab=8192)
    with HubServer() as hub:
        hub.add_directory("org/model", model)
        env = hub.env(tmp_path / "cache", NO_PROXY="127.0.0.1,localhost")
        done = tightfit("shard", "org/model", tmp_path / "out", "-tp", "8", "--ranks", "3", env=env)
        assert done.returncode == 0, done.stderr
        weights = [r for r in hub.requests if r.method == "GET" and "/cdn/" in r.path]
        fetched = sum(r.body_bytes for r in weights)
    whole = (model / "model.safetensors").stat().st_size
    assert fetched < 0.6 * whole
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    shard(job_of(model, 8, {3}), tmp_path / "expected", NoProgress())
    names = [p.name for p in (tmp_path / "out").glob("*.safetensors")]
    assert names
    joined = b"".join((tmp_path / "out" / name).read_bytes() for name in sorted(names))
    assert len(joined) > job_of(model, 8, {3}).copied_bytes


def test_local_work_imports_no_fsspec(tiny_model: TinyModel, tmp_path: Path) -> None:
    shown = "import sys; from tightfit.cli.main import main\n"
    shown += "try: main()\nfinally: print(json.dumps([m in sys.modules for m in "
    shown += "('fsspec', 'aiohttp', 's3fs')]), file=sys.stderr)"
    for arguments in (
        ["shard", tiny_model("llama"), tmp_path / "out", "-tp", "2"],
        ["verify", tmp_path / "out"],
        ["merge", tmp_path / "out", tmp_path / "merged"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", "import json\n" + shown, *map(os.fspath, arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stderr.splitlines()[-1]) == [False] * 3
