import subprocess
import sys

import pytest

from tightfit.checkpoint.remote_source import FsspecSource
from tightfit.checkpoint.source import LocalSource, safe_name
from tightfit.errors import CheckpointError, ConfigError, MissingExtraError


@pytest.mark.parametrize("name", ["model.safetensors", "sub/a-b_c.json", "a..b", "..a", "ü"])
def test_plain_names_are_safe(name):
    assert safe_name(name, "the index") == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a\\b", "a\0b", "C:a", "c:/a"],
)
def test_names_that_may_escape_are_refused(name):
    with pytest.raises(CheckpointError) as e:
        safe_name(name, "the index")
    assert str(e.value) == (
        f"the index names the file {name!r}, which is not a plain name inside the checkpoint"
    )


@pytest.fixture(params=["local", "memory"])
def source(request, tmp_path):
    if request.param == "local":
        (tmp_path / "sub").mkdir()
        (tmp_path / "b.json").write_bytes(b"0123456789")
        (tmp_path / "a.txt").write_bytes(b"")
        yield LocalSource(tmp_path)
        return
    from fsspec.implementations.memory import MemoryFileSystem

    fs = MemoryFileSystem()
    fs.pipe({"/m/b.json": b"0123456789", "/m/a.txt": b"", "/m/sub/c.txt": b""})
    yield FsspecSource("memory://m/")
    fs.rm("/m", recursive=True)


def test_a_source_reads_ranges(source):
    assert source.files() == ["a.txt", "b.json"]
    assert source.others() == ["sub/"]
    assert source.exists("b.json")
    assert not source.exists("sub")
    assert not source.exists("none")
    assert source.size("b.json") == 10
    assert source.read("b.json") == b"0123456789"
    assert source.read("b.json", 2, 5) == b"234"
    assert source.read("b.json", 8, 20) == b"89"
    assert source.read("b.json", 3, 3) == b""
    assert source.read("a.txt") == b""


def test_a_source_refuses_missing_files_and_escapes(source):
    with pytest.raises(CheckpointError, match=r"there is no file 'none' in "):
        source.read("none")
    with pytest.raises(CheckpointError, match=r"there is no file 'none' in "):
        source.size("none")
    for call in (source.exists, source.size, source.read):
        with pytest.raises(CheckpointError, match="not a plain name"):
            call("../b.json")


def test_links_may_not_leave_a_directory(tmp_path):
    (tmp_path / "outside").write_text("secret")
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "data").mkdir()
    (inside / "data" / "config.json").write_text("{}")
    (inside / "config.json").symlink_to("data/config.json")
    (inside / "model.safetensors").symlink_to("../outside")
    source = LocalSource(inside)
    assert source.read("config.json") == b"{}"
    for call in (source.read, source.size, source.exists, source.local_path):
        with pytest.raises(CheckpointError, match="is a link that leads out of the directory"):
            call("model.safetensors")


def test_a_hugging_face_cache_is_made_of_links(tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (tmp_path / "blobs" / "12").mkdir(parents=True)
    (repo / "blobs" / "h1").write_text("{}")
    (tmp_path / "blobs" / "12" / "h2").write_text("shared")
    (repo / "blobs" / "h2").symlink_to("../../blobs/12/h2")
    (snapshot / "config.json").symlink_to("../../blobs/h1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/h2")
    (snapshot / "gone").symlink_to("../../blobs/h3")
    (snapshot / "escape").symlink_to("../../../outside")
    (tmp_path / "outside").write_text("secret")
    source = LocalSource(snapshot)
    assert source.files() == ["config.json", "escape", "model.safetensors"]
    assert source.others() == ["gone"]
    assert source.read("config.json") == b"{}"
    assert source.read("model.safetensors") == b"shared"
    assert source.local_path("config.json") == (repo / "blobs" / "h1").resolve()
    assert not source.exists("gone")
    with pytest.raises(CheckpointError, match="leads out"):
        source.read("escape")


def test_not_a_directory(tmp_path):
    with pytest.raises(ConfigError, match="there is no directory"):
        LocalSource(tmp_path / "none")


def test_unreadable_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "f").write_text("")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(CheckpointError, match=r"cannot read 'f' in .*: Permission denied"):
        LocalSource(tmp_path).read("f")


def without(package: str, url: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from tightfit.checkpoint.remote_source import FsspecSource\n"
        "from tightfit.errors import TightfitError\n"
        f"try: FsspecSource({url!r})\n"
        "except TightfitError as e: print(type(e).__name__, e, e.hint, sep='|')\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_s3_needs_its_extra():
    name, message, hint = without("s3fs", "s3://bucket/model").stdout.strip().split("|")
    assert name == MissingExtraError.__name__
    assert "'s3fs', which is not installed" in message
    assert hint == "pip install 'tightfit[s3]'"


def test_https_needs_aiohttp():
    name, message, hint = without("aiohttp", "https://example.org/m").stdout.strip().split("|")
    assert name == ConfigError.__name__
    assert message.startswith("cannot open https://example.org/m: ")
    assert hint == "pip install aiohttp"


def test_unknown_protocol():
    with pytest.raises(ConfigError, match=r"cannot open ssshh://x/y: Protocol not known: ssshh"):
        FsspecSource("ssshh://x/y")


def test_errors_of_the_store_are_one_line(monkeypatch):
    source = FsspecSource("memory://m")

    def broken(*args, **kwargs):
        raise RuntimeError("NoCredentials: unable to sign\nmore\nlines")

    monkeypatch.setattr(source._fs, "cat_file", broken)
    with pytest.raises(CheckpointError) as e:
        source.read("config.json")
    assert str(e.value) == (
        "cannot read 'config.json' in memory://m: NoCredentials: unable to sign"
    )


def test_a_server_that_ignores_ranges(monkeypatch):
    source = FsspecSource("memory://m")
    monkeypatch.setattr(source._fs, "cat_file", lambda path, start, end: bytes(1000))
    with pytest.raises(CheckpointError, match="ignores byte ranges: it sent 1000 bytes"):
        source.read("model.safetensors", 0, 8)
