"""Files that are not ours stay as they are, whatever their names."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.interrupted import begin, write
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import OutputError, VerificationError
from tightfit.model.stored import stored_layout
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.remote.upload import shard_to
from tightfit.sharding.shard import ShardJob, prepare

TinyModel = Callable[[str], Path]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_journals_that_are_no_files(kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim.txt"
    out.mkdir()
    victim.write_text("precious\n")
    path = out / "tightfit-rank-0.journal"
    path.symlink_to(victim) if kind == "link" else os.mkfifo(path)
    with pytest.raises(OutputError, match=r"tightfit-rank-0.journal is not a regular file"):
        write(tiny_model("llama"), out, resume=True)
    assert victim.read_text() == "precious\n"


@pytest.mark.parametrize("text", ["precious\n", '{"mine": 1}\n', '["job"]\n'])
def test_a_foreign_file_with_the_name_of_a_journal(
    text: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "tightfit-rank-0.journal"
    path.write_text(text)
    with pytest.raises(OutputError, match="is damaged, or no journal of tightfit"):
        write(tiny_model("llama"), tmp_path, resume=True)
    assert path.read_text() == text


@pytest.mark.parametrize(
    "name", ["config.json.rank0.partial", "tightfit-manifest.json.rank0.partial"]
)
def test_small_files_do_not_follow_links(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim.txt"
    victim.write_text("precious\n")
    begin(tiny_model("llama"), out)
    (out / f"{name}.rank0.partial").symlink_to(victim)
    write(tiny_model("llama"), out, resume=True)
    assert victim.read_text() == "precious\n"


def test_a_pipe_with_the_name_of_a_side_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    begin(tiny_model("llama"), tmp_path)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OutputError, match=r"config.json is not a regular file"):
        write(tiny_model("llama"), tmp_path, resume=True)


def test_rank_files_of_others(tiny_model: TinyModel, tmp_path: Path) -> None:
    """As vLLM's own script saves them, and `plan --output` may have put its answer beside them."""
    name = "model-rank-0-part-0.safetensors"
    (tmp_path / name).write_text("precious\n")
    (tmp_path / "tightfit-plan.json").write_text("{}")
    for options in ({"resume": True}, {"ranks": {0}}):
        with pytest.raises(OutputError, match="is not empty"):
            write(tiny_model("llama"), tmp_path, **options)
    (tmp_path / "tightfit-plan.json").unlink()
    write(tiny_model("llama"), tmp_path / "out", ranks={1})
    for path in (tmp_path / "out").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "out").rmdir()
    for options in ({"resume": True}, {"ranks": {0}}):
        with pytest.raises(OutputError, match=f"holds {name}, and nothing there says"):
            write(tiny_model("llama"), tmp_path, **options)
    assert (tmp_path / name).read_text() == "precious\n"


def test_stores_keep_what_is_not_ours(tiny_model: TinyModel) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    fs = MemoryFileSystem()
    model = tiny_model("llama")

    def job_of(rank: int) -> ShardJob:
        return prepare(
            open_checkpoint(str(model)),
            stored_layout("vllm-0.32"),
            tensor_parallel_size=2,
            max_shard_bytes=10**9,
            ranks={rank},
        )

    fs.pipe_file("/foreign/tightfit-plan.json", b"{}")
    try:
        with pytest.raises(OutputError, match="is not empty"):
            shard_to(job_of(0), "memory://foreign", NoProgress())
        fs.rm_file("/foreign/tightfit-plan.json")
        shard_to(job_of(0), "memory://foreign", NoProgress())
        job = job_of(1)

        class Meanwhile(NoProgress):
            def phase(self, name: str, total_bytes: int) -> None:
                fs.pipe_file("/foreign/tightfit-plan.json", b"{}")

        shard_to(job, "memory://foreign", Meanwhile())
        names = {name.rsplit("/", 1)[1] for name in fs.find("/foreign")}
        assert {n for n in names if n.startswith("tightfit-")} == {
            "tightfit-manifest.json",
            "tightfit-plan.json",
        }
    finally:
        fs.rm("/foreign", recursive=True)


def test_a_rank_manifest_that_says_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    write(model, tmp_path / "rank1", ranks={1})
    write(model, out, ranks={0})
    for path in (tmp_path / "rank1").iterdir():
        path.rename(out / path.name)
    with pytest.raises(VerificationError, match="all ranks have come") as e:
        read_manifest(out)
    assert e.value.hint == "run the same command again with --resume"
    (out / "tightfit-rank-1.json").write_text("garbage")
    with pytest.raises(VerificationError) as e:
        read_manifest(out)
    assert e.value.message == f"{out} is not whole: of 2 ranks it lacks 1 (begun: 1)"
    assert e.value.hint == "run `tightfit shard` into it with --ranks 1 --resume"
