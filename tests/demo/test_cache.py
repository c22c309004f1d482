import os
import threading
from pathlib import Path

import pytest

from tightfit.demo.cache import cache_directory, cached
from tightfit.errors import OutputError


def is_whole(directory: Path) -> bool:
    return (directory / "done").is_file()


def build(new: Path) -> None:
    (new.parent / "scratch").write_text("removed afterwards")
    (new / "done").touch()


def quiet(line: str) -> None:
    raise AssertionError(line)


def test_cache_directory_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TIGHTFIT_CACHE", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "tightfit"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_directory() == tmp_path / ".cache" / "tightfit"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/tightfit")
    monkeypatch.setenv("TIGHTFIT_CACHE", "~/mine")
    assert cache_directory() == tmp_path / "mine"


def test_builds_once_and_tidies_up(tmp_path: Path) -> None:
    entry = tmp_path / "new" / "entry"
    assert cached(entry, is_whole=is_whole, build=build, progress=quiet) == entry
    assert cached(entry, is_whole=is_whole, build=lambda _: quiet("built"), progress=quiet) == entry
    assert sorted(os.listdir(entry.parent)) == ["entry", "entry.lock"]


def test_two_at_once_build_once(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    waiting = threading.Event()
    built: list[Path] = []
    lines: list[str] = []

    def slow(new: Path) -> None:
        assert waiting.wait(30)
        built.append(new)
        build(new)

    def note(line: str) -> None:
        lines.append(line)
        waiting.set()

    def run() -> None:
        cached(entry, is_whole=is_whole, build=slow, progress=note)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(built) == 1
    assert lines == ["waiting for another process that is preparing entry"]
    assert is_whole(entry)


def test_without_locks_the_first_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("tightfit.demo.cache.fcntl.flock", no_locks)
    entry = tmp_path / "entry"

    def overtaken(new: Path) -> None:
        entry.mkdir()
        (entry / "done").write_text("theirs")
        build(new)

    cached(entry, is_whole=is_whole, build=overtaken, progress=quiet)
    assert (entry / "done").read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["entry", "entry.lock"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / "entry.abc.partial" / "new"
    stale.mkdir(parents=True)
    (stale / "done").touch()
    cached(tmp_path / "entry", is_whole=is_whole, build=build, progress=quiet)
    assert sorted(os.listdir(tmp_path)) == ["entry", "entry.lock"]


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write the cache .*file") as caught:
        cached(tmp_path / "file" / "entry", is_whole=is_whole, build=build, progress=quiet)
    assert "TIGHTFIT_CACHE" in str(caught.value.hint)
