import json
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from support.cli import assert_error, tightfit
from support.configs import DIRECTORY
from tightfit.cli.options import FLAGS
from tightfit.planner.options import PlanOptions

LLAMA = DIRECTORY / "Llama-3.1-8B.json"


def words(text: str) -> str:
    return " ".join(text.split())


def test_every_option_has_a_flag() -> None:
    own = {"device", "tokenizer_json_bytes", "quantization_recipe", "model_impl"}
    assert set(FLAGS) - {"gpu", "gpu_memory"} == set(PlanOptions.__annotations__) - own


def test_vllms_spellings() -> None:
    done = tightfit(
        *("plan", LLAMA, "--gpu", "h100", "-tp", "2", "--max_num_seqs", "64", "-O2", "--json"),
        *("-cc.cudagraph_mode=FULL", "--cpu-offload-gb", "4GiB", "--no-enable-prefix-caching"),
        *("--limit-mm-per-prompt.image", "2", "--no-async-scheduling"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["options"]["max_num_seqs"]["value"] == 64


def test_advise() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "rtx4090", "--advise")
    assert done.returncode == 1
    text = words(done.stdout)
    assert "What helps, each change alone" in text
    assert "fits 15.7 GiB --tensor-parallel-size 2" in text or "--tensor-parallel-size 2" in text
    document = json.loads(tightfit("plan", LLAMA, "--gpu", "rtx4090", "--advise", "--json").stdout)
    assert document["advice"][0]["fits"] is True
    assert set(document["advice"][0]) == {"change", "saves_bytes", "costs", "fits"}
    assert json.loads(tightfit("plan", LLAMA, "--json").stdout)["advice"] == []


def test_fit() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "rtx4090", "--fit")
    assert done.returncode == 0
    first = done.stdout.splitlines()[0]
    assert first.startswith("the longest context that fits: --max-model-len ")
    length = ("--max-model-len", "16k")
    done = tightfit("plan", LLAMA, "--gpu", "rtx4090", "--fit", *length)
    assert done.stdout.startswith("the most sequences: --max-num-seqs ")
    assert "16,000 tokens at the same time" in words(done.stdout)
    done = tightfit("plan", LLAMA, "--fit", *length, "--json")
    document = json.loads(done.stdout)
    assert document["fit"]["what"] == "gpu"
    assert document["fit"]["value"] == document["device"]["name"]
    assert document["fit"]["candidates"][0]["gpu"] == document["device"]["name"]
    done = tightfit("plan", LLAMA, "--fit", *length)
    assert done.stdout.startswith("the smallest that fits: 1 × ")
    assert "GPUs" in done.stdout


def test_nothing_fits() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "t4", "--fit")
    assert done.returncode == 1
    assert done.stdout.startswith("no max_model_len fits\ndoes not fit: ")


def test_sweep() -> None:
    flags = ("--gpu", "rtx4090", "--sweep", "tp=1,2,3", "--sweep", "max_model_len=8k,64k")
    done = tightfit("plan", LLAMA, *flags, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0
    head, *rows = done.stdout.splitlines()
    assert head.split()[:3] == ["tensor_parallel_size", "max_model_len", "fits"]
    assert [row.split()[:3] for row in rows[:4]] == [
        ["1", "8,000", "yes"],
        ["1", "64,000", "no"],
        ["2", "8,000", "yes"],
        ["2", "64,000", "yes"],
    ]
    reason = "cannot be (rows 5, 6): tensor parallel size 3 does not divide num_attention_heads"
    assert reason in words(done.stdout)
    document = json.loads(tightfit("plan", LLAMA, *flags, "--json").stdout)
    assert document["schema"] == 1
    assert len(document["sweep"]["points"]) == 6
    assert document["sweep"]["axes"]["max_model_len"] == [8000, 64000]


@pytest.mark.parametrize("columns", [60, 80])
def test_a_sweep_is_whole_on_a_narrow_page(columns: int) -> None:
    axes = ("gpu=rtx4090", "max_model_len=8k", "tp=1,2")
    flags = [word for axis in axes for word in ("--sweep", axis)]
    data = json.loads(tightfit("plan", LLAMA, *flags, "--json").stdout)["sweep"]["points"]
    page = tightfit("plan", LLAMA, *flags, env={**os.environ, "COLUMNS": str(columns)}).stdout
    assert max(map(len, page.splitlines())) <= columns
    assert "…" not in page
    for point in data:
        assert f"{point['kv_cache']['tokens']:,}" in page
        assert f"{point['verdict']['max_model_len_that_fits']:,}" in page


def test_sweeps_that_find_nothing() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "t4", "--sweep", "max_model_len=64k,128k")
    assert done.returncode == 1
    done = tightfit("plan", LLAMA, "--gpu", "h100", "--sweep", "tp=3,5")
    assert_error(done, 2, "tensor parallel size 3 does not divide num_attention_heads = 32")
    done = tightfit("plan", LLAMA, "--sweep", "size=1")
    assert_error(done, 2, "unknown option 'size'")


def test_diff(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(tightfit("plan", LLAMA, "--gpu", "h100", "--json").stdout)
    new.write_text(tightfit("plan", LLAMA, "--gpu", "h100", "--enforce-eager", "--json").stdout)
    done = tightfit("plan", "--diff", old, new)
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["cuda_graphs", "744", "MiB", "-", "-744", "MiB"] in lines or any(
        line[:1] == ["cuda_graphs"] and "-" in line for line in lines
    )
    document = json.loads(tightfit("plan", "--diff", old, new, "--json").stdout)
    assert document["schema"] == 1
    assert document["diff"]["facts"][0]["name"] == "enforce_eager"
    assert_error(tightfit("plan", "--diff", old, LLAMA), 2, f"{LLAMA} is not a plan")


def test_explain_all() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "h100", "--explain", "all")
    assert done.returncode == 0
    names = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert names[:2] == ["weights", "  MLP in BF16"]
    assert "cuda_graphs" in names


def test_explain_as_data() -> None:
    done = tightfit("plan", LLAMA, "--explain", "weights", "--json")
    (one,) = json.loads(done.stdout)["explain"]
    assert one["planned_bytes"] == sum(part["nbytes"] for part in one["parts"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep", "tp=1", "--advise"], "--sweep and --advise cannot be answered together"),
        (["--sweep", "tp=1", "--fit"], "--sweep and --fit cannot be answered together"),
        (["--explain", "all", "--emit", "vllm"], "--explain and --emit cannot be answered"),
    ],
)
def test_questions_that_exclude_each_other(flags: list[str], message: str) -> None:
    done = tightfit("plan", LLAMA, "--gpu", "h100", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")


def test_the_catalogue() -> None:
    done = tightfit("plan", "--gpu", "list")
    assert ["h100-80gb", "79.18", "as", "logged"] in [
        line.split() for line in done.stdout.splitlines()
    ]
    gpus = json.loads(tightfit("plan", "--gpu", "list", "--json").stdout)["gpus"]
    assert len(gpus) > 50


def test_from_command_and_yaml(tmp_path: Path) -> None:
    line = f"vllm serve {LLAMA} -tp 2 --max-model-len 16k --max-num-seqs 32"
    done = tightfit("plan", "--from-command", line, "--gpu", "h100", "-tp", "4", "--json")
    options = json.loads(done.stdout)["options"]
    assert options["tensor_parallel_size"]["value"] == 4
    assert options["max_model_len"]["value"] == 16_000
    assert options["max_num_seqs"]["value"] == 32
    config = tmp_path / "vllm.yaml"
    config.write_text("max-model-len: 4096\nenforce-eager: true\n")
    done = tightfit("plan", LLAMA, "--config", config, "--gpu", "h100", "--json")
    options = json.loads(done.stdout)["options"]
    assert options["max_model_len"]["value"] == 4096
    assert options["enforce_eager"]["value"] is True
    done = tightfit("plan", "--config", config)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no MODEL given")


def test_from_log(tmp_path: Path) -> None:
    log = DIRECTORY.parent / "logs" / "v0.25.1.log"
    done = tightfit("plan", LLAMA, "--from-log", log)
    assert done.returncode == 0
    assert "max_concurrency" in done.stdout
    text = tightfit("plan", LLAMA, "--from-log", log, "--json").stdout
    lines = {line["name"]: line for line in json.loads(text)["log"]["lines"]}
    assert lines["max_concurrency"]["logged"] == 55.85
    assert abs(lines["available_kv"]["difference"]) < 2**29


@pytest.mark.parametrize(
    ("kind", "word"),
    [("vllm", "vllm serve"), ("compose", "services:"), ("k8s", "kind: Deployment")],
)
def test_emit(kind: str, word: str) -> None:
    done = tightfit("plan", LLAMA, "--gpu", "h100", "--emit", kind)
    assert done.returncode == 0
    assert word in done.stdout
    assert "--kv-cache-memory-bytes" in done.stdout


def test_emit_refuses() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "t4", "--emit", "vllm")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "nothing to emit, for the plan does not fit" in done.stderr
    done = tightfit("plan", LLAMA, "--gpu", "h100", "--emit", "helm")
    assert_error(done, 2, "unknown --emit 'helm'")


def test_reports(tmp_path: Path) -> None:
    page, picture = tmp_path / "plan.html", tmp_path / "sweep.svg"
    assert tightfit("plan", LLAMA, "--gpu", "h100", "--report", page).returncode == 0
    assert page.read_text().startswith("<!")
    flags = ("--gpu", "h100", "--sweep", "tp=1,2", "--report", picture)
    assert tightfit("plan", LLAMA, *flags).returncode == 0
    assert ET.parse(picture).getroot().tag.endswith("svg")
