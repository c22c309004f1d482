import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from support.cli import ESCAPE, assert_error, tightfit
from support.configs import DIRECTORY
from support.hub_server import HubServer
from support.work import write_shards

LLAMA = DIRECTORY / "Llama-3.1-8B.json"
TinyModel = Callable[[str], Path]


def test_json_is_one_document() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "h100-80gb", "-tp", "4", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    weights = [rank["components"][0]["planned_bytes"] for rank in document["ranks"]]
    assert weights == [4_015_529_984] * 4
    assert document["options"]["tensor_parallel_size"] == {"value": 4, "origin": "flag"}


def test_spellings_of_numbers() -> None:
    done = tightfit(
        *("plan", LLAMA, "--gpu-memory", "24GiB", "--max-model-len", "32K"),
        *("--max-num-batched-tokens", "4k", "--kv-cache-memory-bytes", "5GB", "--json"),
    )
    options = json.loads(done.stdout)["options"]
    assert options["max_model_len"]["value"] == 32_768
    assert options["max_num_batched_tokens"]["value"] == 4000
    assert options["kv_cache_memory_bytes"]["value"] == 5 * 10**9


@pytest.mark.parametrize("auto", ["auto", "-1"])
def test_auto_length(auto: str) -> None:
    done = tightfit("plan", LLAMA, "--gpu", "rtx4090-24gb", "--max-model-len", auto, "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0
    assert document["options"]["max_model_len"]["origin"] == "fitted"
    longest = document["verdict"]["max_model_len_that_fits"]
    assert document["options"]["max_model_len"]["value"] == longest > 10_000


def test_graphs_and_runner() -> None:
    arguments = ("plan", LLAMA, "--gpu", "h100-80gb", "--engine-version", "0.25.1")
    done = tightfit(
        *(*arguments, "--cudagraph-capture-sizes", "8, 1", "--no-use-v2-model-runner", "--json")
    )
    document = json.loads(done.stdout)
    assert document["options"]["cudagraph_capture_sizes"] == {"value": [1, 8], "origin": "flag"}
    assert document["options"]["model_runner"] == {"value": "v1", "origin": "flag"}
    human = tightfit(*arguments, "--enforce-eager")
    assert "cuda_graphs" not in human.stdout
    assert "The driver will show" in human.stdout
    assert "outside" in human.stdout


def test_does_not_fit() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "t4-16gb", "--json")
    assert done.returncode == 1
    assert done.stderr == ""
    verdict = json.loads(done.stdout)["verdict"]
    assert verdict["fits"] is False
    human = tightfit("plan", LLAMA, "--gpu", "t4-16gb")
    assert human.returncode == 1
    assert human.stdout.startswith("does not fit: a rank holds 1")
    assert "vllm would say: No available memory for the cache blocks" in human.stdout


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_escape_codes_in_a_pipe(variables: dict[str, str]) -> None:
    done = tightfit("plan", LLAMA, "--gpu", "h100-80gb", env=os.environ | variables)
    assert done.returncode == 0
    assert ESCAPE not in done.stdout + done.stderr
    assert done.stdout.startswith("fits: ")
    assert max(map(len, done.stdout.splitlines()[:-1])) < 400


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--gpu", "x"], 2, "unknown GPU 'x'"),
        (["--gpu", "h100-80gb", "--gpu-memory", "1GiB"], 2,
         "--gpu and --gpu-memory contradict each other"),
        (["-tp", "3"], 2, "tensor parallel size 3 does not divide num_attention_heads = 32"),
        (["-tp", "0"], 2, "--tensor-parallel-size 0 is out of range"),
        (["-tp", "1000000000000"], 2,
         "tensor parallel size 1000000000000 does not divide the padded vocabulary = 128256"),
        (["-pp", "33"], 2, "pipeline parallel size 33 is more than num_hidden_layers = 32"),
        (["--max-model-len", "many"], 2, "'many' is not a number of tokens"),
        (["--max-model-len", "1M"], 2, "--max-model-len 1048576 is more than the model's 131072"),
        (["--kv-cache-memory-bytes", "8GX"], 2, "'8GX' is not a size"),
        (["--gpu-memory-utilization", "nan"], 2, "--gpu-memory-utilization nan is out of range"),
        (["--dtype", "int4"], 2, "unknown --dtype 'int4'"),
        (["--engine", "other"], 2, "unknown --engine 'other'"),
        (["--engine-version", "0.1"], 2, "vLLM 0.1 is not modelled"),
        (["--entrypoint", "batch"], 2, "unknown --entrypoint 'batch'"),
        (["--cudagraph-capture-sizes", "1,x"], 2,
         "--cudagraph-capture-sizes '1,x' is not a list of numbers"),
        (["--cudagraph-capture-sizes", "0"], 2, "--cudagraph-capture-sizes 0 is out of range"),
        (["--max-cudagraph-capture-size", "0"], 2,
         "--max-cudagraph-capture-size 0 is out of range"),
        (["--revision", "main"], 2, f"--revision main does not apply to {LLAMA}"),
    ],
)  # fmt: skip
def test_usage_errors(arguments: list[str], code: int, message: str) -> None:
    assert_error(tightfit("plan", LLAMA, *arguments), code, message)


def test_explain() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "h100-80gb", "--explain", "weights")
    assert done.stdout.startswith("weights: 8,030,261,248 parameters in BF16")
    assert "16,060,522,496 bytes" in done.stdout
    assert_error(
        tightfit("plan", LLAMA, "--explain", "magic"), 2, "the plan has no component 'magic'"
    )


def test_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"architectures": ["Evil\\u001b[31m"]}')
    done = tightfit("plan", path)
    assert_error(done, 3, "architecture Evil\\x1b[31m is not modelled")
    assert ESCAPE not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json of {} is not JSON: Expecting value (line 1, column 1)"),
        ("[]", "config.json of {} is not a JSON object but a list"),
        ('{"architectures": ["LlamaForCausalLM"]}', "config.json lacks 'num_attention_heads'"),
    ],
)
def test_bad_configs(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert_error(tightfit("plan", tmp_path), 2, message.format(tmp_path))


def test_no_such_model(tmp_path: Path) -> None:
    done = tightfit("plan", tmp_path / "nothing")
    assert_error(done, 2, f"there is no file or directory {tmp_path / 'nothing'}")


def test_names_of_tensors_are_harmless(tiny_model: TinyModel, tmp_path: Path) -> None:
    from tightfit.checkpoint.header import encode_header

    config = tiny_model("llama") / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    name = "model.norm\x1b]0;owned\x07\n\r.weight"
    header = encode_header([(name, "F32", (1,), 4)])
    (tmp_path / "model.safetensors").write_bytes(header + b"\0\0\0\0")
    done = tightfit("plan", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    assert all(c.isprintable() or c == "\n" for c in done.stderr)


def test_report(tmp_path: Path) -> None:
    done = tightfit("plan", LLAMA, "--gpu", "h100-80gb", "--report", tmp_path / "plan.svg")
    assert done.returncode == 0
    root = ET.parse(tmp_path / "plan.svg").getroot()
    assert root.tag.endswith("svg")
    assert "weights" in "".join(root.itertext())
    done = tightfit("plan", LLAMA, "--report", tmp_path / "plan.gif")
    assert done.returncode == 2
    done = tightfit("plan", LLAMA, "--json", "--report", tmp_path / "no" / "plan.svg")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot write {tmp_path / 'no' / 'plan.svg'}")


def test_headers_are_checked(tiny_model: TinyModel) -> None:
    done = tightfit("plan", tiny_model("qwen3_moe"), "--json")
    model = json.loads(done.stdout)["model"]
    assert model["weights_origin"] == "headers"
    assert model["name"] == tiny_model("qwen3_moe").name
    size = (tiny_model("qwen3_moe") / "model.safetensors").stat().st_size
    assert 0 < size - model["checkpoint_bytes"] < 20_000


def test_sharded_directory(tiny_model: TinyModel, tmp_path: Path) -> None:
    write_shards(tiny_model("llama"), tmp_path / "out", 2)
    sharded = json.loads(tightfit("plan", tmp_path / "out", "-tp", "2", "--json").stdout)
    plain = json.loads(tightfit("plan", tiny_model("llama"), "-tp", "2", "--json").stdout)
    assert sharded["ranks"] == plain["ranks"]
    assert sharded["model"]["weights_origin"] == "shapes"


def test_hub_id_without_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add_directory("org/llama", tiny_model("llama"))
        done = tightfit("plan", "org/llama", "--json", env=hub.env(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"]["weights_origin"] == "headers"
        weights = (tiny_model("llama") / "model.safetensors").stat().st_size
        assert hub.bytes_sent("/cdn/") <= 100_000 < weights
        hub.clear()
        done = tightfit("plan", "org/nothing", env=hub.env(tmp_path / "cache"))
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 2


def test_closed_pipe() -> None:
    for arguments in (["plan", LLAMA], ["plan", LLAMA, "--json"], ["plan", "--help"]):
        command = [sys.executable, "-m", "tightfit", *map(os.fspath, arguments)]
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
        os.close(writer)
        assert b"Traceback" not in done.stderr, (arguments, done.stderr)
        assert b"Exception ignored" not in done.stderr, (arguments, done.stderr)


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_full_disk(as_json: list[str]) -> None:
    command = [sys.executable, "-m", "tightfit", "plan", os.fspath(LLAMA), *as_json]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: cannot write to the standard output: No space left on device\n"
        "hint: free some space, or send the output elsewhere\n"
    )


def test_a_sharded_directory_brings_its_size(tiny_model: TinyModel, tmp_path: Path) -> None:
    write_shards(tiny_model("llama"), tmp_path / "out", 2)
    document = json.loads(tightfit("plan", tmp_path / "out", "--json").stdout)
    assert len(document["ranks"]) == 2
    done = tightfit("plan", tmp_path / "out", "-tp", "4")
    assert_error(done, 1, f"{tmp_path / 'out'} was sharded for tensor parallel size 2, not 4")


def test_an_explanation_is_no_verdict() -> None:
    config = DIRECTORY / "Llama-3.1-8B.json"
    done = tightfit("plan", config, "--gpu-memory", "8GiB", "--explain", "weights")
    assert done.returncode == 0
    first, mlp, *_ = done.stdout.splitlines()
    assert first == "weights: 8,030,261,248 parameters in BF16: 16,060,522,496 bytes"
    assert mlp == "  MLP in BF16: 5,637,144,576 parameters, 11,274,289,152 bytes (70.2%)"
