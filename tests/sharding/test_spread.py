"""Parts as tasks: the same files as in one pass, whatever happens to the attempts."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.cli import assert_error, tightfit
from support.interrupted import Copied, begin, digests, write
from support.spreading import InProcess, make_job
from tightfit.cli.output import NoProgress
from tightfit.errors import CheckpointError, OutputError, TaskLostError
from tightfit.sharding import spread
from tightfit.sharding.shard import shard

TinyModel = Callable[[str], Path]


def spread_out(
    model: Path, out: Path, executor: Any = None, bars: NoProgress | None = None, **options: Any
) -> None:
    job = make_job(model, seconds=0)
    shard(job, out, bars or NoProgress(), executor=executor or InProcess(), **options)


class Disturbed(InProcess):
    """Does something to each attempt before its result arrives."""

    def __init__(self, disturb: Callable[[int, Any], None]) -> None:
        self.before_done = disturb  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["llama_bias", "jamba", "gpt2"])
def test_the_same_files(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(name)
    write(model, tmp_path / "whole")
    spread_out(model, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    # From one size to another, whose rows are put together of several files.
    write(tmp_path / "whole", tmp_path / "again", size=1)
    spread_job = shard_of(tmp_path / "whole")
    shard(spread_job, tmp_path / "again2", NoProgress(), executor=InProcess())
    assert digests(tmp_path / "again2") == digests(tmp_path / "again")


def shard_of(directory: Path) -> Any:
    from tightfit.checkpoint.checkpoint import open_checkpoint
    from tightfit.model.stored import stored_layout
    from tightfit.sharding.shard import prepare

    return prepare(
        open_checkpoint(str(directory)),
        stored_layout("vllm-0.32"),
        tensor_parallel_size=1,
        max_shard_bytes=10**5,
    )


def test_going_on_from_one_pass_and_back(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    write(model, tmp_path / "whole")
    total = begin(model, tmp_path / "out", 0.9)
    bars = Copied()
    spread_out(model, tmp_path / "out", bars=bars, resume=True)
    assert bars.totals["checking"] > 0
    assert bars.totals["copying"] < 0.8 * total
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")

    def stop(number: int, task: object) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spread_out(model, tmp_path / "other", Disturbed(stop), resume=True)
    begun = tmp_path / "other"
    assert len(list(begun.glob("*.safetensors.partial"))) == 3
    assert not list(begun.glob("*.attempts.partial"))
    # Damage to what was noted as complete is found.
    path = sorted(begun.glob("*.safetensors.partial"))[1]
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    bars = Copied()
    write(model, begun, bars=bars, resume=True)
    assert bars.totals["copying"] < total
    assert digests(begun) == digests(tmp_path / "whole")


def test_nothing_is_left_of_a_failure(tiny_model: TinyModel, tmp_path: Path) -> None:
    def stop(number: int, task: object) -> None:
        if number == 3:
            raise TaskLostError("lost")

    with pytest.raises(TaskLostError):
        spread_out(tiny_model("llama"), tmp_path / "deep" / "out", Disturbed(stop))
    assert list(tmp_path.iterdir()) == []


def test_attempts_that_were_cut_off(tiny_model: TinyModel, tmp_path: Path) -> None:
    """They hold their file open, or come back when everything is over."""
    model, out = tiny_model("llama"), tmp_path / "out"
    write(model, tmp_path / "whole")
    late: list[Any] = []
    held: list[int] = []

    def cut_off(number: int, task: spread.WriteTask) -> None:
        path = task.directory / f"{task.name}.of-another-attempt.partial"
        held.append(os.open(path, os.O_RDWR | os.O_CREAT))
        os.write(held[-1], b"half")
        late.append(task)

    spread_out(model, out, Disturbed(cut_off))
    assert digests(out) == digests(tmp_path / "whole")
    job = make_job(model, seconds=0)
    source = job.checkpoint.source
    shared = spread.Shared(source=source, sources={"model.safetensors": None}, left="")
    for descriptor, task in zip(held, late, strict=True):
        os.pwrite(descriptor, b"nonsense", 0)
        os.close(descriptor)
        with pytest.raises(OutputError, match="is not the directory of that name"):
            spread.write(shared, task, lambda nbytes: None)
    assert digests(out) == digests(tmp_path / "whole")


def test_directories_that_are_not_shared(tiny_model: TinyModel, tmp_path: Path) -> None:
    def lose(number: int, task: spread.WriteTask) -> None:
        for path in task.directory.iterdir():
            path.unlink()

    with pytest.raises(OutputError) as e:
        spread_out(tiny_model("llama"), tmp_path / "out", Disturbed(lose))
    assert e.value.message.endswith("was written elsewhere, and is not here")

    def cut(number: int, task: spread.WriteTask) -> None:
        for path in task.directory.iterdir():
            os.truncate(path, 17)

    with pytest.raises(OutputError, match="and has 17 here"):
        spread_out(tiny_model("llama"), tmp_path / "out", Disturbed(cut))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_a_full_disk(
    call: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError) as e:
        spread_out(tiny_model("llama"), tmp_path / "out")
    assert "and no space left" in e.value.message
    assert e.value.hint == "free some space, or write to another disk; nothing was left behind"
    assert list(tmp_path.iterdir()) == []


def test_another_model_elsewhere(tiny_model: TinyModel, tmp_path: Path) -> None:
    job = make_job(tiny_model("llama"), seconds=0)
    work = spread.plan_parts(job)[0]
    sources = {name: [3, 0] for name in work.sources}
    shared = spread.Shared(source=job.checkpoint.source, sources=sources, left="")
    with pytest.raises(CheckpointError, match="and 3 where tightfit was started"):
        spread.write(shared, spread.WriteTask(work=work, directory=tmp_path), lambda nbytes: None)
    assert list(tmp_path.iterdir()) == []


def test_options(tiny_model: TinyModel, tmp_path: Path) -> None:
    arguments = ("shard", tiny_model("llama"), tmp_path / "out")
    done = tightfit(*arguments, "--executor", "dask")
    assert_error(done, 2, "there is no executor 'dask'")
    done = tightfit(*arguments, "--ray-address", "auto")
    assert_error(done, 2, "--ray-address auto is of no use without Ray")
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing" / "ray.py").write_text("raise ImportError")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "missing")}
    done = tightfit(*arguments, "--executor", "ray", env=env)
    assert_error(
        done,
        2,
        "`tightfit shard --executor ray` needs the package 'ray', which is not installed",
    )
    assert done.stderr.endswith("hint: pip install 'tightfit[ray]'\n")
    assert not (tmp_path / "out").exists()
