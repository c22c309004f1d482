# ruff: noqa: PT012 (what happens to the directory inside the block is the subject here)
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tightfit.demo.output import OutputDirectory
from tightfit.errors import CheckpointError, OutputError


def tree(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


def test_files_appear_together_and_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with OutputDirectory(out) as directory:
        part = directory.create("w.safetensors", 10)
        assert (part.name, part.nbytes) == ("w.safetensors", 10)
        assert os.fstat(part.fd).st_size == 10
        os.pwrite(part.fd, b"56789", 5)
        os.pwrite(part.fd, b"01234", 0)
        part.close()
        directory.create("empty", 0)
        directory.write_text("config.json", '{"a": "ü"}')
        directory.write_text("sub/manifest.json", "ü")
        assert tree(out) == [
            "config.json.partial",
            "empty.partial",
            "sub",
            "sub/manifest.json.partial",
            "w.safetensors.partial",
        ]
        directory.commit()
        assert part.path == out / "w.safetensors"
    assert tree(out) == ["config.json", "empty", "sub", "sub/manifest.json", "w.safetensors"]
    assert (out / "w.safetensors").read_bytes() == b"0123456789"
    assert (out / "config.json").read_text() == '{"a": "ü"}'
    assert (out / "sub" / "manifest.json").read_text() == "ü"
    assert (out / "empty").read_bytes() == b""


def test_names_are_given_in_the_order_of_creation(tmp_path, monkeypatch):
    renamed = []
    rename = os.rename

    def spy(old, new):
        renamed.append(Path(new).name)
        rename(old, new)

    monkeypatch.setattr(os, "rename", spy)
    with OutputDirectory(tmp_path / "out") as directory:
        for name in ("z", "a", "manifest.json"):
            directory.write_text(name, name)
        assert renamed == []
        directory.commit()
    assert renamed == ["z", "a", "manifest.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        with OutputDirectory(tmp_path / "out") as directory:
            directory.write_text("a", "a")
            directory.commit()
    finally:
        os.umask(old)
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_exception(tmp_path, error):
    (tmp_path / "other").write_text("keep")
    with pytest.raises(error), OutputDirectory(tmp_path / "a" / "b") as directory:
        directory.create("w", 100)
        directory.write_text("sub/x", "x")
        raise error
    assert tree(tmp_path) == ["other"]


def test_nothing_is_left_without_commit(tmp_path):
    (tmp_path / "out").mkdir()
    with OutputDirectory(tmp_path / "out") as directory:
        directory.write_text("a", "a")
    assert tree(tmp_path) == ["out"]


def test_an_interrupted_commit_takes_all_names_back(tmp_path, monkeypatch):
    rename = os.rename

    def interrupted(old, new):
        rename(old, new)
        if Path(new).name == "b":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), OutputDirectory(tmp_path / "out") as directory:
        for name in "abc":
            directory.write_text(name, name)
        directory.commit()
    assert tree(tmp_path) == []


def test_what_others_put_there_stays(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(OutputError, match="has appeared"), OutputDirectory(out) as directory:
        directory.write_text("a", "a")
        directory.write_text("b", "b")
        (out / "b").write_text("theirs")
        directory.commit()
    assert tree(tmp_path) == ["new", "new/out", "new/out/b"]
    assert (out / "b").read_text() == "theirs"


def test_existing_outputs_are_refused_and_untouched(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with (
        pytest.raises(OutputError, match=r"the output directory .*full is not empty"),
        OutputDirectory(tmp_path / "full"),
    ):
        pass
    with (
        pytest.raises(OutputError, match="is an existing file"),
        OutputDirectory(tmp_path / "full" / "x"),
    ):
        pass
    with (
        pytest.raises(OutputError, match=r"cannot write .*: Not a directory"),
        OutputDirectory(tmp_path / "full" / "x" / "y"),
    ):
        pass
    assert tree(tmp_path) == ["full", "full/x"]


def test_names_may_not_leave_the_directory(tmp_path):
    with (
        pytest.raises(CheckpointError, match="not a plain name"),
        OutputDirectory(tmp_path / "o") as directory,
    ):
        directory.create("../x", 1)
    assert tree(tmp_path) == []


def fail_with(number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"cannot write \S+/w: it needs 2.00 GiB, and no space left \(.* free\)"),
        (errno.EDQUOT, r"cannot write \S+/w: it needs 2.00 GiB, and the disk quota is used up"),
        (errno.EFBIG, r"cannot write \S+/w: 2.00 GiB is more than a file may have here"),
        (errno.EROFS, r"cannot write \S+/w: Read-only file system"),
        (errno.EIO, r"cannot write \S+/w: Input/output error"),
    ],
)
def test_reserving_fails(tmp_path, monkeypatch, number, message):
    monkeypatch.setattr(os, "posix_fallocate", fail_with(number))
    with pytest.raises(OutputError, match=message) as e, OutputDirectory(tmp_path / "o") as out:
        out.create("w", 2 * 2**30)
    assert e.value.hint
    assert tree(tmp_path) == []


def test_file_systems_that_cannot_reserve(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", fail_with(errno.EOPNOTSUPP))
    with OutputDirectory(tmp_path / "o") as out:
        out.create("w", 12345)
        out.commit()
    assert (tmp_path / "o" / "w").stat().st_size == 12345


@pytest.mark.parametrize("stage", ["write", "commit"])
def test_the_disk_fills_up_later(tmp_path, monkeypatch, stage):
    with pytest.raises(OutputError, match="no space left"), OutputDirectory(tmp_path / "o") as out:
        out.create("w", 10)
        if stage == "write":
            raise OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
        out.commit()
    assert tree(tmp_path) == []


def test_errors_of_other_files_are_not_called_output_errors(tmp_path):
    with pytest.raises(FileNotFoundError), OutputDirectory(tmp_path / "o") as out:
        out.create("w", 10)
        open(tmp_path / "none")  # noqa: SIM115
    assert tree(tmp_path) == []


def test_a_real_limit_on_file_sizes(tmp_path):
    code = (
        "import sys\n"
        "from tightfit.demo.output import OutputDirectory\n"
        "from tightfit.errors import OutputError\n"
        "try:\n"
        "    with OutputDirectory(sys.argv[1]) as out:\n"
        "        out.write_text('small', 'x')\n"
        "        out.create('large', 2**21)\n"
        "except OutputError as e: print(e)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    assert process.stdout == (
        f"cannot write {tmp_path}/out/large: 2.00 MiB is more than a file may have here\n"
    )
    assert process.stderr == ""
    assert tree(tmp_path) == []


def test_a_real_interrupt_while_writing(tmp_path):
    code = (
        "import os, sys, time\n"
        "from tightfit.demo.output import OutputDirectory\n"
        "with OutputDirectory(sys.argv[1]) as out:\n"
        "    part = out.create('w', 2**20)\n"
        "    print('ready', flush=True)\n"
        "    while True: os.pwrite(part.fd, b'x' * 2**20, 0)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a" / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=10)[1]
    assert tree(tmp_path) == []


def test_no_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    code = (
        "import os, sys\n"
        "from tightfit.demo.output import OutputDirectory\n"
        "from tightfit.errors import OutputError\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "try:\n"
        "    with OutputDirectory(sys.argv[1]): pass\n"
        "except OutputError as e: print(e)\n"
    )
    out = tmp_path / "closed" / "out"
    process = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True
    )
    assert process.stdout == f"cannot write {out}: Permission denied\n"
    assert tree(tmp_path) == ["closed"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full")
def test_a_device_that_is_full(tmp_path):
    with pytest.raises(OutputError, match="no space left"), OutputDirectory(tmp_path / "o") as out:
        part = out.create("w", 10)
        full = os.open("/dev/full", os.O_RDWR)
        os.dup2(full, part.fd)
        os.close(full)
        os.write(part.fd, b"x" * 10)
    assert tree(tmp_path) == []


def test_more_files_than_descriptors(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        with OutputDirectory(tmp_path / "o") as out:
            for i in range(100):
                out.create(f"w{i}", 1).close()
            out.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(tree(tmp_path / "o")) == 100
