"""A disk that is full, or too small, is said so, and leaves nothing that looks whole."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.interrupted import begin, digests, write
from tightfit.checkpoint import writer
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
    monkeypatch.setattr(writer, "_free_bytes", lambda path: 10**5)
    with pytest.raises(OutputError, match="and its file system has"):
        write(model, out)
    assert not out.exists()
    monkeypatch.undo()
    begin(model, out, 0.99)
    # What is there already needs no more room.
    monkeypatch.setattr(writer, "_free_bytes", lambda path: 10**5)
    write(model, out, resume=True)
