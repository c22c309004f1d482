"""A disk that is full, or too small, is said so, and leaves nothing that looks whole."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.interrupted import begin, digests, write
from tightfit.checkpoint import disk
from tightfit.errors import OutputError

TinyModel = Callable[[str], Path]
MANIFEST = "tightfit-manifest.json"


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["preadv", "pwritev", "fsync", "rename", "write"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_full_disk(
    call: str, resume: bool, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    real, count = getattr(os, call), 0

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return full() if count == 3 else real(*args, **kwargs)

    monkeypatch.setattr(os, call, sometimes)
    with pytest.raises(OutputError) as e:
        write(model, out, resume=resume)
    monkeypatch.undo()
    assert "no space left" in e.value.message
    assert e.value.hint is not None
    if resume:
        assert e.value.hint.endswith("--resume continues what is there")
        assert not (out / MANIFEST).exists()
        write(model, out, resume=True)
        write(model, tmp_path / "whole")
        assert digests(out) == digests(tmp_path / "whole")
    else:
        assert e.value.hint.endswith("nothing was left behind")
        assert not out.exists()


def test_too_little_space_is_known_before(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    monkeypatch.setattr(disk, "_free_bytes", lambda path: 10**5)
    with pytest.raises(OutputError, match="and its file system has"):
        write(model, out)
    assert not out.exists()
    monkeypatch.undo()
    begin(model, out, 0.99)
    # What is there already needs no more room.
    monkeypatch.setattr(disk, "_free_bytes", lambda path: 10**5)
    write(model, out, resume=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, on which the tiny model has room once, and not twice."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "none", path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this user cannot mount a file system: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_a_disk_that_is_too_small(
    known: bool,
    resume: bool,
    tiny_model: TinyModel,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is said before anything is copied, and also if somebody else takes the room meanwhile."""
    out, other = small_disk / "out", small_disk / "other"
    other.write_bytes(bytes(800_000))
    if not known:
        monkeypatch.setattr(disk, "_free_bytes", lambda path: None)
    with pytest.raises(OutputError) as e:
        write(tiny_model("llama"), out, resume=resume)
    if known:
        assert "and its file system has" in e.value.message
    else:
        assert "no space left" in e.value.message
    assert not (out / MANIFEST).exists()
    assert resume or not out.exists()
    monkeypatch.undo()
    other.unlink()
    write(tiny_model("llama"), out, resume=resume)
    write(tiny_model("llama"), small_disk.parent / "whole")
    assert digests(out) == digests(small_disk.parent / "whole")
