"""A disk that fails while it is read: the file is named, and waiting threads end."""

import errno
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import typer

from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress, guarded
from tightfit.errors import CheckpointError
from tightfit.sharding.proof.content import InTurn, in_threads
from tightfit.sharding.proof.verify import verify

TinyModel = Callable[[str], Path]
SHARD, WEIGHTS = "model-rank-0-part-0.safetensors", "model.safetensors"


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(
    ("where", "against", "file"), [("preadv", False, SHARD), ("pread", True, WEIGHTS)]
)
def test_verify(
    code: int,
    where: str,
    against: bool,
    file: str,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    write_shards(model, tmp_path / "out", 1)
    config = open_checkpoint(str(tmp_path / "out")).config
    source = open_checkpoint(str(model)) if against else None
    path = (model if against else tmp_path / "out") / file
    monkeypatch.setattr(os, where, failing(getattr(os, where), path, code))
    with pytest.raises(CheckpointError) as e:
        verify(tmp_path / "out", config, NoProgress(), source)
    assert e.value.message == f"cannot read {file}: {os.strerror(code)}"


def test_shard(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(os, "preadv", failing(os.preadv, model / WEIGHTS, errno.EIO))
    with pytest.raises(CheckpointError) as e:
        write_shards(model, tmp_path / "out", 2)
    assert e.value.message == f"cannot read {WEIGHTS}: {os.strerror(errno.EIO)}"


def failing(real: Callable[..., object], path: Path, code: int) -> Callable[..., object]:
    def read(fd: int, *rest: object) -> object:
        if os.path.samestat(os.fstat(fd), path.stat()):
            raise OSError(code, os.strerror(code))
        return real(fd, *rest)

    return read


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_not_the_standard_output(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def command() -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(typer.Exit):
        command()
    assert capsys.readouterr().err.startswith(f"error: cannot read or write: {os.strerror(code)}\n")


def test_a_mistake_of_ours_stays_one() -> None:
    @guarded
    def command() -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        command()


def test_interruption_ends_what_has_begun() -> None:
    """A tensor of many gigabytes is not read to its end first."""
    advance = InTurn(lambda _: None)

    def long(number: int) -> int:
        for _ in range(3000 * number):
            advance(1)
            time.sleep(0.01)
        return number

    running = in_threads(long, [0, 1], advance=advance)
    assert isinstance(running, Generator)
    assert next(running) == 0
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt)
    assert time.monotonic() - started < 10
