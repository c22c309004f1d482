"""`quantize` that stops half-way, and goes on to the same bytes."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from support.interrupted import Copied, digests, in_child
from support.seeded_models import LLAMA, write_seeded_model
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import OutputError
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize.job import prepare
from tightfit.quantize.write import WriteJob, is_there, write, write_job

JOURNAL = "tightfit-quantize.journal"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(LLAMA, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    write(job_of(model), out, NoProgress())
    return digests(out)


def job_of(model: Path, scheme: str = "w4a16-asym", max_shard_bytes: int = 2 * 10**5) -> WriteJob:
    wish = Wish(default=Choice(scheme=scheme, group_size=64))
    job = prepare(open_checkpoint(str(model)), wish)
    return write_job(job, max_shard_bytes=max_shard_bytes)


def begin(job: WriteJob, out: Path, share: float = 0.6) -> int:
    """Interrupt at a share of the work; returns the bytes of all of it."""
    bars = Copied(share)
    with pytest.raises(KeyboardInterrupt):
        write(job, out, bars, resume=True)
    return bars.totals["copying"]


def test_killed_anywhere(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """Dead at every seventh call of the system; the threads make their order differ each time."""
    job = job_of(model)

    def work(out: Path, *, resume: bool) -> Callable[[], object]:
        return lambda: write(job, out, NoProgress(), resume=resume)

    calls = in_child(work(tmp_path / "count", resume=False))
    assert calls > 100
    for last in range(3, calls, calls // 14):
        out = tmp_path / f"out-{last}"
        if in_child(work(out, resume=False), last) == -9:
            finished = (out / "config.json").exists() and not (out / JOURNAL).exists()
            assert finished or digests(out) != whole if out.exists() else True
        assert write(job, out, NoProgress(), resume=True) in (True, False)
        assert digests(out) == whole, last


def test_only_what_is_not_proven_is_made(
    model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    total = begin(job_of(model), out)
    assert not (out / "config.json").exists()
    bars = Copied()
    assert write(job_of(model), out, bars, resume=True)
    assert 0 < bars.totals["copying"] < 0.7 * total
    assert digests(out) == whole
    bars = Copied()
    assert not write(job_of(model), out, bars, resume=True)
    assert bars.totals.keys() == {"checksums"}
    assert digests(out) == whole


def test_what_was_damaged_meanwhile_is_made_again(
    model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    begin(job_of(model), out, 0.9)
    for path in out.glob("*.safetensors.partial"):
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(bytes(1000))
    write(job_of(model), out, NoProgress(), resume=True)
    assert digests(out) == whole


def test_a_source_written_anew_proves_nothing(
    model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    out = tmp_path / "out"
    total = begin(job_of(copy), out)
    os.utime(copy / "model.safetensors", (1, 1))
    bars = Copied()
    write(job_of(copy), out, bars, resume=True)
    assert bars.totals["copying"] == total
    assert digests(out) == whole


def test_another_recipe_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(job_of(model), out)
    before = digests(out)
    with pytest.raises(OutputError, match="is the beginning of another quantize: its recipe is "):
        write(job_of(model, "w4a16"), out, NoProgress(), resume=True)
    with pytest.raises(OutputError, match="is the beginning of another quantize: its max_shard"):
        write(job_of(model, max_shard_bytes=3 * 10**5), out, NoProgress(), resume=True)
    with pytest.raises(OutputError, match="holds an unfinished output"):
        write(job_of(model), out, NoProgress())
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        write(job_of(model), out, NoProgress(), resume=True)
    (out / "notes.txt").unlink()
    assert digests(out) == before
    write(job_of(model), out, NoProgress(), resume=True)
    with pytest.raises(OutputError, match="holds another quantized checkpoint: its recipe is"):
        write(job_of(model, "w4a16"), out, NoProgress(), resume=True)
    with pytest.raises(OutputError, match="is not empty"):
        write(job_of(model), out, NoProgress())


def test_what_is_finished_is_known_before_calibration(model: Path, tmp_path: Path) -> None:
    """A calibrated job does not know all of its tensors before."""
    out, job = str(tmp_path / "out"), job_of(model)
    assert not is_there(job, out, NoProgress(), resume=False)
    begin(job, Path(out))
    assert not is_there(job, out, NoProgress(), resume=True)
    with pytest.raises(OutputError, match="is not empty"):
        is_there(job, out, NoProgress(), resume=False)
    write(job, out, NoProgress(), resume=True)
    assert is_there(job, out, NoProgress(), resume=True)
    with pytest.raises(OutputError, match="holds another quantized checkpoint"):
        is_there(job_of(model, "w4a16"), out, NoProgress(), resume=True)


def test_damage_of_what_is_finished(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(job_of(model, max_shard_bytes=10**9), out, NoProgress())
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x77")
    with pytest.raises(OutputError, match=r"is finished, and damaged: model\.safetensors: "):
        write(job_of(model, max_shard_bytes=10**9), out, NoProgress(), resume=True)


def test_interrupted_without_resume(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(job_of(model), tmp_path / "deep" / "out", Copied(0.5))
    assert list(tmp_path.iterdir()) == []


def test_files_that_may_not_grow(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, before[1]))
        with pytest.raises(OutputError, match="is more than a file may have here"):
            write(job_of(model), out, NoProgress(), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not (out / "config.json").exists()
    write(job_of(model), out, NoProgress(), resume=True)
    assert digests(out) == whole
    assert json.loads((out / "config.json").read_text())["quantization_config"]
