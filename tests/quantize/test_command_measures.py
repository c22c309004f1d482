"""What `quantize` does with texts: calibrate, evaluate, rank, spend a budget."""

import json
import os
import shutil
from pathlib import Path

import pytest

from support.seeded_models import LLAMA, write_seeded_model
from support.words import write_word_tokenizer
from support.work import digests
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli import quantize_steps as steps
from tightfit.cli.main import build

TEXT = " ".join(f"w{(7 * i * i + 3 * i) % 251}" for i in range(800))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_seeded_model(LLAMA, tmp_path_factory.mktemp("llama") / "model")
    write_word_tokenizer(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def call(*arguments: str | Path) -> int:
    words = [str(one) for one in arguments]
    with pytest.raises(SystemExit) as end:
        build(words)(words)
    assert isinstance(end.value.code, int)
    return end.value.code


def test_calibrated(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = ("--scheme", "w4a16", "--group-size", "64", "--method", "gptq")
    options += ("--calibration", str(text), "--calibration-samples", "4")
    options += ("--calibration-length", "32")
    assert call("quantize", model, tmp_path / "whole", *options) == 0
    assert call("quantize", model, tmp_path / "rtn", *options[:4]) == 0
    weights = {name: digests(tmp_path / name)["model.safetensors"] for name in ("whole", "rtn")}
    assert weights["whole"] != weights["rtn"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rtn", "text.txt", "whole"]
    for path in (tmp_path / "whole").iterdir():
        assert b"w3 w" not in path.read_bytes()

    def stop(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "write", stop)
        assert call("quantize", model, out, *options) == 130
    kept = tmp_path / "out.calibration"
    assert f"{kept} has the layers that are calibrated; --resume" in capsys.readouterr().err
    assert kept.is_dir()
    assert call("quantize", model, out, *options, "--resume") == 0
    assert digests(out) == digests(tmp_path / "whole")
    assert not kept.exists()
    capsys.readouterr()
    monkeypatch.setattr(steps, "calibrate", stop)
    assert call("quantize", model, out, *options, "--resume") == 0
    assert "holds all of it already, as its checksums prove" in capsys.readouterr().out
    assert call("quantize", model, out, *options) == 2
    assert call("quantize", model, out, *options, "--seed", "1", "--resume") == 2
    assert "the work of another call: --seed was 0, and is 1" in capsys.readouterr().err
    assert call("verify", out) == 0
    assert call("verify", out, "--against", model) == 2
    assert "was calibrated (gptq), and cannot be made again" in capsys.readouterr().err
    copy = shutil.copytree(model, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (1, 1))
    assert call("quantize", copy, out, *options, "--resume") == 2
    assert "were written anew, and what was calibrated cannot be" in capsys.readouterr().err


def test_outputs_are_refused_before_the_work(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no(*_: object, **__: object) -> None:
        raise AssertionError("this takes hours")

    monkeypatch.setattr(steps, "calibrate", no)
    monkeypatch.setattr("tightfit.quantize.budget.fit_budget", no)
    file, directories, foreign = (tmp_path / name for name in ("file", "directories", "foreign"))
    file.write_text("")
    (directories / "logs").mkdir(parents=True)
    shutil.copytree(model, foreign)
    calibrated = ("--scheme", "w4a16", "--group-size", "64", "--method", "gptq")
    calibrated += ("--calibration", str(text))
    for options in (calibrated, ("--budget", "1GiB")):
        for out, said in (
            (file, "is an existing file"),
            (directories, "is not empty"),
            (foreign, "is not empty"),
            (file / "below", "cannot write"),
            (tmp_path / ("x" * 256), "cannot write"),
        ):
            for more in ((), ("--resume",)):
                assert call("quantize", model, out, *options, *more) == 2
                assert said in capsys.readouterr().err
    # What was begun with other options is known before as well.
    begun = tmp_path / "begun"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tightfit.quantize.write.write_parts", stop)
        assert call("quantize", model, begun, "--scheme", "int8", "--resume") == 130
    (begun / "tightfit-quantize.journal").write_text('{"job": {"recipe": {"scheme": "int8"}}}')
    assert call("quantize", model, begun, *calibrated, "--resume") == 2
    assert "--scheme was int8, and is w4a16" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.calibration"))


def test_measured(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "out", tmp_path / "report.html"
    options = ("--scheme", "fp8-channel", "--evaluate", text, "--sensitivity", "--report", page)
    assert call("quantize", model, out, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    before, after = (found["perplexity"][when]["value"] for when in ("before", "after"))
    assert before == pytest.approx(after, rel=0.05)
    assert before != after
    assert len(found["sensitivity"]["layers"]) == 3
    assert len(found["quality"]["matrices"]) == 21
    assert page.read_text().startswith("<!doctype html>")
    # The same, and nothing is written.
    assert call("quantize", model, tmp_path / "no", *options, "--json", "--dry-run") == 0
    again = json.loads(capsys.readouterr().out)
    assert {**again, "output": found["output"], "written": True} == found
    assert not (tmp_path / "no").exists()
    missing = ("--scheme", "int8", "--evaluate", tmp_path / "missing.txt")
    assert call("quantize", model, tmp_path / "no", *missing) == 2
    assert "cannot read the text" in capsys.readouterr().err
    text.write_text("w1")
    assert call("quantize", model, tmp_path / "no", "--scheme", "int8", "--evaluate", text) == 2
    assert "the text has 1 tokens" in capsys.readouterr().err
    ranked = ("--scheme", "int8", "--sensitivity", "--calibration", text)
    assert call("quantize", model, tmp_path / "no", *ranked) == 2
    assert "the calibration text has 1 tokens" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("scheme", "method"), [("w4a16", "gptq"), ("w4a16", "awq"), ("nvfp4", "rtn")]
)
def test_what_was_calibrated_is_ranked(
    scheme: str,
    method: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--scheme", scheme, "--method", method, "--calibration", text, "--sensitivity")
    options += ("--calibration-samples", "4", "--calibration-length", "32", "--json")
    options += ("--ignore", r"layers\.2\.")
    found = []
    for more in ((), ("--resume",)):
        assert call("quantize", model, tmp_path / "out", *options, *more) == 0
        found.append(json.loads(capsys.readouterr().out)["sensitivity"])
    assert found[0] == found[1]
    assert found[0]["calibrated"] is True
    layers = {one["layer"]: one for one in found[0]["layers"]}
    assert layers[0]["damage"] > 0
    assert layers[2]["damage"] < 1e-4
    assert layers[2]["parameters"] == 0


def test_budget(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = sum(info.nbytes for info in open_checkpoint(str(model)).tensors().values())
    size = f"{whole * 6 // 10}B"
    assert call("quantize", model, tmp_path / "out", "--budget", size, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sizes"]["total"]["after_bytes"] <= whole * 6 // 10
    assert found["budget"]["total_bytes"] == found["sizes"]["total"]["after_bytes"]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(found["recipe"]))
    assert call("quantize", model, tmp_path / "again", "--recipe", recipe, "-q") == 0
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert call("quantize", model, tmp_path / "out", "--budget", "100KiB") == 2
    assert not (tmp_path / "out").exists()


def test_a_dry_run_needs_no_text(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text("scheme: nvfp4\nkv_cache: fp8\n")
    options = ("quantize", model, out, "--recipe", recipe, "--json")
    assert call(*options) == 2
    assert "needs text to calibrate with" in capsys.readouterr().err
    assert call(*options, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    assert call(*options, "--dry-run", "--report", tmp_path / "page.html") == 2
    assert "nothing is calibrated in a dry run" in capsys.readouterr().err
    small = ("--calibration-samples", "2", "--calibration-length", "16")
    assert call(*options, "--calibration", text, *small) == 0
    written = json.loads(capsys.readouterr().out)
    assert planned == {**written, "written": False}


def test_a_dry_run_writes_its_report_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    options = ("--scheme", "int8", "--dry-run", "--report", page)
    assert call("quantize", model, tmp_path / "out", *options) == 0
    assert capsys.readouterr().out.endswith(f"wrote the errors of every matrix to {page}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
