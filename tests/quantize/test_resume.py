"""`quantize` that stops half-way, and goes on to the same bytes."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.interrupted import Copied, digests, in_child
from support.seeded_models import LLAMA, write_seeded_model
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import OutputError, VerificationError
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize.differing import difference
from tightfit.quantize.job import prepare
from tightfit.quantize.write import WriteJob, check_out, is_there, write, write_job

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
    found = digests(out)
    # The manifest tells when the source was written.
    assert {name for name in whole if found[name] != whole[name]} == {"tightfit-quantize.json"}


def test_another_recipe_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(job_of(model), out)
    before = digests(out)
    with pytest.raises(
        OutputError,
        match=r"holds the work of another call: --scheme was w4a16-asym, and is w4a16$",
    ):
        write(job_of(model, "w4a16"), out, NoProgress(), resume=True)
    with pytest.raises(OutputError, match=r"--max-shard-size was 200,000, and is 300,000$"):
        write(job_of(model, max_shard_bytes=3 * 10**5), out, NoProgress(), resume=True)
    with pytest.raises(OutputError, match="holds an unfinished output"):
        write(job_of(model), out, NoProgress())
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        write(job_of(model), out, NoProgress(), resume=True)
    (out / "notes.txt").unlink()
    assert digests(out) == before
    write(job_of(model), out, NoProgress(), resume=True)
    with pytest.raises(OutputError, match="holds the work of another call: --scheme was"):
        write(job_of(model, "w4a16"), out, NoProgress(), resume=True)
    # Files of other names as well.
    with pytest.raises(OutputError, match=r"work of another call: --max-shard-size was"):
        write(job_of(model, max_shard_bytes=10**9), out, NoProgress(), resume=True)
    with pytest.raises(OutputError, match="is not empty"):
        write(job_of(model), out, NoProgress())


def test_what_is_finished_is_known_before_calibration(model: Path, tmp_path: Path) -> None:
    """A calibrated job does not know all of its tensors before."""
    out, job = str(tmp_path / "out"), job_of(model)
    assert not is_there(job, out, NoProgress())
    begin(job, Path(out))
    assert not is_there(job, out, NoProgress())
    with pytest.raises(OutputError, match=r"--scheme was w4a16-asym, and is w4a16$"):
        is_there(job_of(model, "w4a16"), out, NoProgress())
    write(job, out, NoProgress(), resume=True)
    assert is_there(job, out, NoProgress())
    with pytest.raises(OutputError, match=r"--scheme was w4a16-asym, and is w4a16$"):
        is_there(job_of(model, "w4a16"), out, NoProgress())


def test_damage_of_what_is_finished(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(job_of(model, max_shard_bytes=10**9), out, NoProgress())
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x77")
    job = job_of(model, max_shard_bytes=10**9)
    for missing in ("", "model.safetensors", "config.json"):
        (out / (missing or "none")).unlink(missing_ok=True)
        name = missing.replace(".", r"\.") or r"model\.safetensors: "
        with pytest.raises(VerificationError, match=rf"is finished, and damaged: .*{name}"):
            write(job, out, NoProgress(), resume=True)
        with pytest.raises(VerificationError, match="is finished, and damaged"):
            is_there(job, str(out), NoProgress())


def test_interrupted_with_resume(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out, job = tmp_path / "out", job_of(model)
    with pytest.raises(KeyboardInterrupt):
        write(job, out, Copied(0.5), resume=True, notice=said.append)
    assert said == [f"{out} has what is complete, and the same command goes on with it"]
    write(job, out, NoProgress(), resume=True)


RECIPE = {"scheme": "w4a16", "group_size": 128, "rules": [], "kv_cache": None}
KEPT = {"match": "down", "keep": True}
FP8 = {"match": "attn", "scheme": "fp8-channel"}
CALIBRATION = {"backend": "own", "samples": 4, "length": 32, "seed": 0, "texts": ["1"]}


@pytest.mark.parametrize(
    ("key", "was", "now", "said"),
    [
        ("recipe", RECIPE, {**RECIPE, "group_size": 64}, "--group-size was 128, and is 64"),
        ("recipe", RECIPE, {**RECIPE, "kv_cache": "fp8"}, "--kv-cache was not given, and is fp8"),
        (
            "recipe",
            {**RECIPE, "rules": [KEPT, FP8]},
            {**RECIPE, "rules": [FP8]},
            "--ignore, or a rule of --recipe, was 'down' kept, and is not given",
        ),
        (
            "recipe",
            {**RECIPE, "rules": [KEPT, FP8]},
            {**RECIPE, "rules": [FP8, KEPT]},
            "--ignore, or a rule of --recipe, was 'down' kept; 'attn' fp8-channel, and is 'attn' "
            "fp8-channel; 'down' kept",
        ),
        ("recipe", None, RECIPE, "recipe was not given, and is {'scheme': 'w4a16',"),
        ("recipe", {**RECIPE, "rules": [1]}, RECIPE, "--ignore, or a rule of --recipe, was 1, and"),
        ("method", "rtn", "mse", "--method was rtn, and is mse"),
        ("tightfit", "0.1", "0.2", "the version of tightfit was 0.1, and is 0.2"),
        ("source_fingerprint", "a", "b", "the model is another one, or its tensors lie elsewhere"),
        ("calibration", CALIBRATION, {}, "--calibration was given, and is not given"),
        ("calibration", CALIBRATION, {**CALIBRATION, "seed": 1}, "--seed was 0, and is 1"),
        (
            "calibration",
            CALIBRATION,
            {**CALIBRATION, "texts": ["2"]},
            "the text of --calibration is another",
        ),
        ("method", "rtn", "rtn", None),
    ],
)
def test_differences_in_the_words_of_the_command_line(
    key: str, was: Any, now: Any, said: str | None
) -> None:
    found = difference({"more": 1, key: was}, {key: now})
    assert found == said if said is None else (found or "").startswith(said)


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


def test_another_model_of_the_same_shapes_is_refused(model: Path, tmp_path: Path) -> None:
    other = write_seeded_model(LLAMA, tmp_path / "other", seed=6)
    copy, out = Path(shutil.copytree(model, tmp_path / "copy")), tmp_path / "out"
    os.utime(copy / "model.safetensors", (1, 1))
    assert write(job_of(copy), out, NoProgress())
    before, bars = digests(out), Copied()
    assert str(tmp_path) not in (out / "tightfit-quantize.json").read_text()
    assert not write(job_of(copy), out, bars, resume=True)
    assert bars.totals.keys() == {"checksums"}
    with pytest.raises(OutputError, match="another call: the model has other weights"):
        write(job_of(other), out, NoProgress(), resume=True)
    # The same bytes of another time are made again, and compared.
    assert not write(job_of(model), out, bars, resume=True)
    assert bars.totals.keys() == {"checksums", "comparing"}
    # As an older version has left it.
    path = out / "tightfit-quantize.json"
    document = json.loads(path.read_text())
    assert document.pop("source_states").keys() == {"model.safetensors"}
    path.write_text(json.dumps(document, separators=(",", ":")))
    assert not write(job_of(model), out, NoProgress(), resume=True)
    with pytest.raises(OutputError, match="another call: the model has other weights"):
        write(job_of(other), out, NoProgress(), resume=True)
    found = digests(out)
    assert {name for name in before if found[name] != before[name]} == {path.name}


def test_what_was_calibrated_is_of_one_state_of_the_model(model: Path, tmp_path: Path) -> None:
    copy, out = Path(shutil.copytree(model, tmp_path / "copy")), tmp_path / "out"
    job = replace(job_of(copy), calibration=CALIBRATION)
    write(job, out, NoProgress())
    assert is_there(job, str(out), NoProgress())
    os.utime(copy / "model.safetensors", (1, 1))
    with pytest.raises(OutputError, match="what was calibrated cannot be compared"):
        is_there(job, str(out), NoProgress())


def test_places_are_refused_before_anything_is_done(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    out = tmp_path / "out"
    check_out(checkpoint, str(out), resume=False)
    out.write_text("")
    with pytest.raises(OutputError, match="is an existing file"):
        check_out(checkpoint, str(out), resume=True)
    with pytest.raises(OutputError, match="cannot write"):
        check_out(checkpoint, str(out / "below"), resume=False)
    with pytest.raises(OutputError, match="cannot write"):
        check_out(checkpoint, str(tmp_path / ("x" * 256)), resume=False)
    out.unlink()
    out.mkdir()
    check_out(checkpoint, str(out), resume=False)
    (out / "logs").mkdir()
    for resume in (False, True):
        with pytest.raises(OutputError, match="is not empty"):
            check_out(checkpoint, str(out), resume=resume)
    (out / "logs").rmdir()
    begin(job_of(model), out)
    check_out(checkpoint, str(out), resume=True)
    with pytest.raises(OutputError, match="holds an unfinished output"):
        check_out(checkpoint, str(out), resume=False)
    write(job_of(model), out, NoProgress(), resume=True)
    check_out(checkpoint, str(out), resume=True)
    with pytest.raises(OutputError, match="is not empty"):
        check_out(checkpoint, str(out), resume=False)
    # A plain checkpoint of somebody else.
    with pytest.raises(OutputError, match="is not empty"):
        check_out(checkpoint, str(model), resume=True)
