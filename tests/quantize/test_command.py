"""`tightfit quantize` as its users have it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.cli import assert_error, tightfit
from support.seeded_models import LLAMA, QWEN3_MOE, write_seeded_model
from support.work import digests
from tightfit.cli import quantize_request as request
from tightfit.cli.main import build
from tightfit.errors import UsageError
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize.recipe_file import document_of, read_recipe, wish_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(LLAMA, tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(QWEN3_MOE, tmp_path_factory.mktemp("moe") / "model")


Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process, which has torch already."""

    def called(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        words = [str(one) for one in arguments]
        with pytest.raises(SystemExit) as end:
            build(words)(words)
        code = end.value.code
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        return subprocess.CompletedProcess(words, code, out, err)

    return called


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
    done = call("quantize", model, out, "--scheme", "w4a16", "--dry-run", "--json")
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert [one["matrices"] for one in document["refusals"]] == [9, 3, 6]
    done = call("quantize", model, out, "--scheme", "w4a16")
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.layers.*.self_attn.q_proj, ")
    assert "192 input features, which 128 do not divide" in done.stderr
    assert "w4a16 with groups of 64" in done.stderr
    assert not out.exists()


def test_sizes_for_ranks(tmp_path: Path, call: Call) -> None:
    model = write_seeded_model({**LLAMA, "num_key_value_heads": 4}, tmp_path / "model")
    out = tmp_path / "out"
    done = call("quantize", model, out, "--scheme", "w4a16", "--for-tp", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.layers.*.mlp.down_proj: tensor parallel size 2 ")
    assert "w4a16 with groups of 64" in done.stderr
    done = call("quantize", model, out, "--scheme", "w4a16")
    assert done.returncode == 0
    assert done.stderr.startswith(
        "warning: the model can be cut for tensor parallel size 2 and 4, and not when quantized"
    )
    done = call(
        *("quantize", model, tmp_path / "two", "--scheme", "w4a16", "--group-size", "64"),
        *("--for-tp", "2", "--ignore", "nothing_like_this"),
    )
    assert done.returncode == 0
    assert done.stdout.endswith("two --tensor-parallel-size 2\n")
    assert done.stderr == "warning: --ignore 'nothing_like_this' matches nothing\n"


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
    if process.returncode == 0:
        pytest.skip("it was done before")
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
    assert_error(call("quantize", llama, tmp_path / "out", *options), 2, message)


def test_what_needs_text() -> None:
    wish = Wish(default=Choice(scheme="nvfp4"))
    options = {"samples": 1, "length": 8, "seed": 0, "useful": False}
    with pytest.raises(UsageError, match="the scheme nvfp4, whose activations have scales of"):
        request.calibration_from(wish, "rtn", (), **options)
    with pytest.raises(UsageError, match=r"there is no calibration text no\.txt"):
        request.calibration_from(wish, "rtn", (Path("no.txt"),), **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is no mapping"),
        ("a: [", "is neither YAML nor JSON"),
        ("schem: int8", "unknown key 'schem'"),
        ("scheme: int9", "there is no scheme 'int9'"),
        ("scheme: [int8]", "two names and a whole number are needed"),
        ("scheme: int8\ngroup_size: 64", "a group size of 64 with the scheme int8"),
        ("scheme: w4a16\ngroup_size: true", "two names and a whole number are needed"),
        ("scheme: int8\nrules: {}", None),
        ("scheme: int8\nrules: {a: b}", "rules are no list"),
        ("scheme: int8\nrules: [{scheme: int8}]", "rule 1 has no pattern to match"),
        (
            "scheme: int8\nrules: [{match: a, keep: true, scheme: int8}]",
            "rule 1 ('a') says neither",
        ),
        ("rules: [{match: a, group_size: 32}]", "rule 1 ('a') says neither"),
        ("scheme: int8\nkv_cache: fp4", "there is no KV cache in 'fp4'"),
        ("scheme: int8\nformat: gptq", "the format 'gptq' does not have the scheme int8"),
    ],
)
def test_recipes_that_are_wrong(text: str, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    if message is None:
        wish_of(read_recipe(path))
        return
    with pytest.raises(UsageError) as e:
        wish_of(read_recipe(path), str(path))
    assert message in e.value.message
    assert str(path) in e.value.message


def test_recipes_are_written_back() -> None:
    document = {
        "scheme": "w4a16",
        "group_size": 64,
        "rules": [
            {"match": "a", "scheme": "w4a16-asym"},
            {"match": "b", "group_size": 32},
            {"match": "c", "scheme": "w4a16"},
            {"match": "d", "scheme": "fp8-channel"},
            {"match": "e", "keep": True},
        ],
    }
    wish = wish_of(document, ignore=["f"])
    assert wish.rules[0] == ("f", None)
    groups = [choice.group for _, choice in wish.rules[1:5] if choice is not None]
    assert groups == [128, 32, 64, None]
    again = wish_of(document_of(wish))
    assert [c and c.label for _, c in again.rules] == [c and c.label for _, c in wish.rules]
    assert again.default == wish.default
    assert document_of(again) == document_of(wish)


def test_flags_and_a_recipe_that_differ(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"scheme": "w4a16", "group_size": 64}')
    flags = {"group_size": None, "file_format": None, "kv_cache": None, "ignore": ()}
    assert request.wish_from(path, scheme="w4a16", **flags).label == "w4a16 g64"
    with pytest.raises(UsageError, match=r"--scheme int8, and .* says 'w4a16'"):
        request.wish_from(path, scheme="int8", **flags)
