"""`tightfit quantize` as its users have it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.cli import Call, assert_error, tightfit
from support.seeded_models import LLAMA, QWEN3_MOE, write_seeded_model
from support.work import digests
from tightfit.cli import quantize_request as request
from tightfit.errors import UsageError
from tightfit.model.quantization.written import Choice, Wish


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(LLAMA, tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(QWEN3_MOE, tmp_path_factory.mktemp("moe") / "model")


def test_write_and_verify(llama: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "out"
    done = tightfit("quantize", llama, out, "--scheme", "fp8-channel")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:7]] == [
        *("attention", "mlp", "embeddings", "head", "other", "total")
    ]
    assert lines[7] == "kept as they are: lm_head, model.embed_tokens"
    assert lines[8].startswith("wrote fp8-channel (rtn), 1.")
    assert lines[8].endswith(f" in 1 file, to {out}")
    assert lines[-1] == f"next: vllm serve {out}"
    done = call("verify", out, "--against", llama)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("every byte as its source gives it\n")
    other = write_seeded_model(LLAMA, tmp_path / "other", seed=6)
    done = call("verify", out, "--against", other)
    assert done.returncode == 1
    assert done.stdout.endswith(f"problems in {out}\n{out} was quantized from model\n")
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x70")
    done = call("verify", out, "--json")
    assert done.returncode == 1
    (problem,) = json.loads(done.stdout)["problems"]
    assert "is damaged (its checksum differs)" in problem
    done = call("verify", out, "-tp", "2")
    assert_error(
        done, 2, f"{out} is quantized, and not sharded: --tensor-parallel-size does not apply"
    )


def test_a_dry_run_says_what_would_be_written(moe: Path, tmp_path: Path, call: Call) -> None:
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text(
        "scheme: w4a16\ngroup_size: 64\nrules:\n"
        "  - {match: '\\.self_attn\\.', scheme: fp8-channel}\n"
        "  - {match: 'layers\\.1\\.mlp', keep: true}\n"
    )
    options = (out, "--recipe", recipe, "--json", "--max-shard-size", "1MiB")
    done = call("quantize", moe, *options, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    planned = json.loads(done.stdout)
    assert planned["recipe"]["rules"][1] == {"match": "layers\\.1\\.mlp", "keep": True}
    sizes = planned["sizes"]
    assert sizes["attention"]["quantized"] == 8
    assert sizes["experts"]["quantized"] == 12
    assert (sizes["mlp"]["quantized"], sizes["mlp"]["kept"]) == (0, 3)
    assert sizes["mlp"]["before_bytes"] == sizes["mlp"]["after_bytes"]
    done = call("quantize", moe, *options)
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    assert {**planned, "written": True} == written
    for file in written["files"]:
        assert (out / file["name"]).stat().st_size == file["nbytes"]
    assert sum(one["nbytes"] for one in written["files"]) == written["total_bytes"]


def test_a_dry_run_says_what_is_refused(tmp_path: Path, call: Call) -> None:
    model = write_seeded_model({**LLAMA, "hidden_size": 192}, tmp_path / "model")
    out = tmp_path / "out"
    done = call("quantize", model, out, "--scheme", "w4a16", "--dry-run")
    assert done.returncode == 2
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused: ")]
    assert len(refused) == 3
    assert "(3 matrices, w4a16 g128)" in refused[1]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("for all of these: use w4a16 with --group-size 64")
    all_of_them = last.partition("--ignore '")[2].removesuffix("'")
    assert "o_proj" in all_of_them
    assert "gate_proj" in all_of_them
    done = call("quantize", model, out, "--scheme", "w4a16", "--dry-run", "--json")
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert [one["matrices"] for one in document["refusals"]] == [9, 3, 6]
    assert last == f"for all of these: {document['remedy']}"
    done = call("quantize", model, out, "--scheme", "w4a16")
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.layers.*.self_attn.q_proj, ")
    assert "192 input features, which 128 do not divide" in done.stderr
    assert "w4a16 with --group-size 64" in done.stderr
    assert not out.exists()


def test_sizes_for_ranks(tmp_path: Path, call: Call) -> None:
    model = write_seeded_model({**LLAMA, "num_key_value_heads": 4}, tmp_path / "model")
    out = tmp_path / "out"
    done = call("quantize", model, out, "--scheme", "w4a16", "--for-tp", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.layers.*.mlp.down_proj: tensor parallel size 2 ")
    assert "w4a16 with --group-size 64" in done.stderr
    done = call("quantize", model, out, "--scheme", "w4a16")
    assert done.returncode == 0
    assert done.stderr.startswith(
        "warning: the model can be cut for tensor parallel size 2 and 4, and not when quantized"
    )
    quiet = call("quantize", model, tmp_path / "quiet", "--scheme", "w4a16", "-q")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    done = call(
        *("quantize", model, tmp_path / "two", "--scheme", "w4a16", "--group-size", "64"),
        *("--for-tp", "2", "--ignore", "nothing_like_this"),
    )
    assert done.returncode == 0
    assert done.stdout.endswith("two --tensor-parallel-size 2\n")
    assert done.stderr == "warning: --ignore 'nothing_like_this' matches nothing\n"


def test_sizes_are_listed_as_people_do(tmp_path: Path, call: Call) -> None:
    config = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 512}
    model = write_seeded_model(config, tmp_path / "model")
    done = call("quantize", model, tmp_path / "out", "--scheme", "w4a16", "--dry-run")
    assert done.returncode == 0
    assert " size 2, 4 and 8, and not when quantized like this" in done.stderr


def test_patterns_that_match_nothing(llama: Path, tmp_path: Path, call: Call) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "scheme: int8\nrules:\n  - {match: nothing, keep: true}\n  - {match: nothing, keep: true}\n"
        "  - {match: embed_tokens, keep: true}\n"
    )
    ignore = ("--ignore", "neither", "--ignore", "down_proj")
    warnings = [
        "warning: the rule that keeps 'nothing' matches nothing",
        "warning: --ignore 'neither' matches nothing",
    ]
    done = call("quantize", llama, tmp_path / "out", "--recipe", recipe, *ignore, "--dry-run")
    assert done.returncode == 0
    assert sorted(done.stderr.splitlines()) == sorted(warnings)
    done = call("shard", llama, tmp_path / "out", "--recipe", recipe, *ignore, "--dry-run")
    assert done.returncode == 0
    assert sorted(done.stderr.splitlines()) == sorted(warnings)
    # Nothing is left for a rule, which is no mistake if --ignore takes it all.
    recipe.write_text("scheme: int8\nrules: [{match: down_proj, scheme: fp8-channel}]")
    done = call("quantize", llama, tmp_path / "out", "--recipe", recipe, *ignore[2:], "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")


def test_parts_of_a_whole_are_not_ignored(llama: Path, tmp_path: Path, call: Call) -> None:
    options = ("quantize", llama, tmp_path / "out", "--scheme", "int8", "--dry-run", "--ignore")
    done = call(*options, "q_proj")
    assert done.returncode == 2
    assert "model.layers.*.self_attn.q_proj as it is, model.layers" in done.stderr
    hint = r"--ignore 'self_attn\.(q_proj|k_proj|v_proj)$'"
    assert hint in done.stderr
    assert call(*options, hint.split("'")[1]).returncode == 0


def test_interrupted(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tightfit", "quantize", llama, out),
            *("--scheme", "int8", "--method", "mse", "-q"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_ray_cluster_writes_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    shutil.copytree(llama, tmp_path / "model")
    options = ("--scheme", "fp8-tensor", "--max-shard-size", "1MiB")
    assert tightfit("quantize", llama, tmp_path / "whole", *options).returncode == 0
    ray = ("--executor", "ray", "--ray-address", "local", "--json")
    done = tightfit("quantize", "model", "out", *options, *ray, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "int3"], "--scheme: there is no scheme 'int3'"),
        (
            ["--scheme", "w4a16", "--group-size", "0"],
            "--group-size: groups of 0 inputs, for which ",
        ),
        (
            ["--scheme", "int8", "--group-size", "64"],
            "--group-size: a group size of 64 with the scheme int8",
        ),
        (["--scheme", "int8", "--format", "ggml"], "--format: there is no format 'ggml'"),
        (
            ["--scheme", "int8", "--format", "gptq"],
            "--format: the format 'gptq' does not have the scheme int8",
        ),
        (["--scheme", "int8", "--ignore", "("], "--ignore: '(' is not a regular expression: "),
        (
            ["--scheme", "int8", "--ignore", "(a+)+"],
            "--ignore: the pattern '(a+)+' could take forever to match: its repeats are nested, ",
        ),
        ([], "neither --scheme nor --recipe says what to make of the model"),
        (["--scheme", "int8", "--method", "best"], "there is no method 'best'"),
        (["--scheme", "w4a16", "--method", "gptq"], "--method gptq needs text to calibrate with"),
        (["--scheme", "int8", "--kv-cache", "fp8"], "--kv-cache fp8 needs text to calibrate with"),
        (["--scheme", "int8", "--for-tp", "0"], "--for-tp 0 is out of range"),
        (["--scheme", "int8", "--max-shard-size", "1KB"], "--max-shard-size 1KB is too small"),
        (
            ["--scheme", "int8", "--budget", "1GiB"],
            "--budget 1GiB finds the recipe, and --scheme int8 is a part of one",
        ),
        (
            ["--budget", "1GiB", "--kv-cache", "fp8"],
            "--budget 1GiB finds the recipe, and --kv-cache fp8 is a part of one",
        ),
        (
            ["--budget", "1GiB", "--format", "gptq"],
            "--budget 1GiB finds the recipe, and --format gptq is a part of one",
        ),
        (
            ["--budget", "1GiB", "--group-size", "64"],
            "--budget 1GiB finds the recipe, and --group-size 64 is a part of one",
        ),
        (
            ["--budget", "1GiB", "--method", "awq"],
            "--budget 1GiB tries fp8-channel and w4a16, and the method awq is not for both",
        ),
        (
            ["--budget", "1GiB", "--method", "gptq", "--backend", "optimum"],
            "--budget 1GiB tries schemes that the backend optimum does not have",
        ),
        (
            ["--scheme", "w4a16", "--method", "gptq", "--backend", "optimum", "--dequantize"],
            "the backend optimum reads the files of the model, which --dequantize would decode",
        ),
        (
            ["--scheme", "int8", "--calibration-samples", "0"],
            "--calibration-samples 0 is out of range",
        ),
        (
            ["--scheme", "int8", "--calibration-length", "-1"],
            "--calibration-length -1 is out of range",
        ),
        (["--recipe", "/dev/zero"], "/dev/zero is too large for a recipe"),
        (
            ["--scheme", "int8", "--report", "no/such/page.html"],
            "--report no/such/page.html: there is no directory no/such",
        ),
        (
            ["--scheme", "int8", "--calibration", "x.txt"],
            "--calibration is of no use to int8 by the method rtn",
        ),
    ],
)
def test_wrong_usage(
    options: list[str], message: str, llama: Path, tmp_path: Path, call: Call
) -> None:
    done = call("quantize", llama, tmp_path / "out", *options)
    assert_error(done, 2, done.stderr.splitlines()[0].removeprefix("error: "))
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("shard", ["out", "--quantize", "nope"], "--quantize: there is no scheme 'nope'"),
        (
            "shard",
            ["out", "--quantize", "w4a16", "--group-size", "5"],
            "--group-size: groups of 5 inputs, for which engines have no kernels",
        ),
        (
            "plan",
            ["--quantization", "int8", "--quantization-ignore", "("],
            "--quantization-ignore: '(' is not a regular expression: ",
        ),
        (
            "plan",
            ["--quantization-group-size", "5", "--quantization-recipe"],
            "--quantization-group-size 5, and recipe.json says 64",
        ),
    ],
)
def test_options_are_called_as_the_command_calls_them(
    command: str,
    options: list[str],
    message: str,
    llama: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.json").write_text('{"scheme": "w4a16", "group_size": 64}')
    recipe = ["recipe.json"] if options[-1].endswith("recipe") else []
    done = call(command, llama, *options, *recipe)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")


def test_what_needs_text() -> None:
    wish = Wish(default=Choice(scheme="nvfp4"))
    options = {"samples": 1, "length": 8, "seed": 0, "useful": False}
    with pytest.raises(UsageError, match="the scheme nvfp4, whose activations have scales of"):
        request.calibration_from(wish, "rtn", (), **options)
    assert request.calibration_from(wish, "rtn", (), **options, dry_run=True) is None
    for name in ("no.txt", "x" * 300):
        with pytest.raises(UsageError, match=f"there is no calibration text {name}"):
            request.calibration_from(wish, "rtn", (Path(name),), **options)


def test_a_report_that_could_not_be_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    request.check_report(out / "page.html", str(out), dry_run=False)
    with pytest.raises(UsageError, match=f"there is no directory {out}"):
        request.check_report(out / "page.html", str(out), dry_run=True)
    with pytest.raises(UsageError, match=r"\.html cannot be written: File name too long"):
        request.check_report(tmp_path / f"{'x' * 300}.html", str(out), dry_run=False)


@pytest.mark.parametrize("command", ["quantize", "shard"])
def test_the_current_directory_is_not_meant(command: str, llama: Path, call: Call) -> None:
    scheme = ("--scheme" if command == "quantize" else "--quantize", "int8")
    done = call(command, llama, "", *scheme, "--dry-run")
    assert_error(done, 2, "the output is an empty string")
