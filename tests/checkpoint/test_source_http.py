"""Checkpoints on web servers, good ones and bad ones."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.file_server import FileServer
from tightfit.checkpoint import store
from tightfit.checkpoint.remote_source import FsspecSource
from tightfit.errors import CheckpointError

pytest.importorskip("aiohttp")

DATA = random.Random(1).randbytes(9 * 2**20 + 5)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(store, "FIRST_WAIT_SECONDS", 0.01)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(DATA)
    with FileServer(tmp_path) as files:
        yield files


def test_ranges(server: FileServer) -> None:
    source = FsspecSource(server.url + "/")
    assert source.files() == ["config.json", "model.safetensors"]
    assert source.size("model.safetensors") == len(DATA)
    assert source.exists("config.json")
    assert not source.exists("none")
    server.sent_bytes = 0
    assert source.read("model.safetensors", 1000, 2000) == DATA[1000:2000]
    assert server.sent_bytes == 1000
    assert source.read("model.safetensors", len(DATA) - 5, len(DATA) + 5) == DATA[-5:]
    assert source.read("model.safetensors", len(DATA), len(DATA) + 5) == b""
    assert source.read("model.safetensors") == DATA


def test_long_reads_come_in_several_ranges(server: FileServer) -> None:
    source = FsspecSource(server.url)
    assert source.read("model.safetensors", 3, len(DATA)) == DATA[3:]
    ranges = server.gets("model.safetensors")
    assert len(ranges) == 5
    assert all(r is not None for r in ranges)


@pytest.mark.parametrize("trouble", ["failing", "breaking"])
def test_what_passes_is_tried_again(server: FileServer, trouble: str) -> None:
    setattr(server, trouble, 3)
    source = FsspecSource(server.url)
    for start in range(0, len(DATA), 2**20):
        stop = min(start + 2**20, len(DATA))
        assert source.read("model.safetensors", start, stop) == DATA[start:stop]


def test_a_server_that_stays_down(server: FileServer) -> None:
    source = FsspecSource(server.url)
    assert source.exists("config.json")
    server.failing = 1
    with pytest.raises(CheckpointError) as e:
        source.read("model.safetensors", 0, 8)
    assert "(status 503), 5 times in a row" in e.value.message
    assert e.value.hint == "the server is overloaded or down; try again later"
    assert len(server.gets("model.safetensors")) == 5


def test_denied(server: FileServer) -> None:
    server.status = 403
    with pytest.raises(CheckpointError, match=r"access was denied: .*\(status 403\)") as e:
        FsspecSource(server.url).exists("config.json")
    assert "credentials" in str(e.value.hint)


def test_some_servers_deny_what_is_not_there(server: FileServer) -> None:
    source = FsspecSource(server.url)
    assert source.exists("config.json")
    server.status = 403
    assert not source.exists("modules.json")


def test_a_server_that_ignores_ranges(server: FileServer) -> None:
    source = FsspecSource(server.url)
    server.ranges = False
    server.sent_bytes = 0
    with pytest.raises(CheckpointError, match=r"the server ignores byte ranges \(status 200\)"):
        source.read("model.safetensors", 0, 8)
    assert len(server.gets("model.safetensors")) == 1
    assert source.read("config.json", 0, 2) == b"{}"


def test_nobody_there(server: FileServer) -> None:
    source = FsspecSource("http://127.0.0.1:9/x")
    with pytest.raises(CheckpointError, match="5 times in a row"):
        source.exists("config.json")


def test_a_server_that_lists_nothing(server: FileServer) -> None:
    server.listing = False
    assert FsspecSource(server.url).files() == ["config.json"]


def test_a_file_that_changes(server: FileServer) -> None:
    source = FsspecSource(server.url)
    before = source.state("model.safetensors")
    assert before == source.state("model.safetensors")
    (server.directory / "model.safetensors").write_bytes(DATA + b"x")
    assert before != source.state("model.safetensors")
