import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support.cli import ESCAPE, assert_error, tightfit
from support.random_models import write_random_model

TinyModel = Callable[[str], Path]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 96,
    "torch_dtype": "bfloat16",
}


def test_from_shard_to_verify(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    done = tightfit("shard", model, out, "--tensor-parallel-size", "2")
    assert done.returncode == 0
    assert done.stderr == ""
    assert ESCAPE not in done.stdout
    assert "wrote 2 files, " in done.stdout
    assert "--load-format sharded_state --tensor-parallel-size 2" in " ".join(done.stdout.split())
    done = tightfit("verify", out, "--against", model)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"verified: {out} is whole: 2 files, ")
    assert "every byte as in its source" in done.stdout

    path = out / "model-rank-1-part-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = tightfit("verify", out)
    assert done.returncode == 1
    problem, verdict = done.stdout.splitlines()
    assert problem.startswith(f"problem: {path.name}: ")
    assert problem.endswith("is damaged (its checksum differs)")
    assert verdict == f"verification failed: 1 problem in {out}"
    done = tightfit("verify", out, "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["ok"] is False
    assert len(document["problems"]) == 1


def test_a_merged_checkpoint_beside_its_original(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out, back = tiny_model("llama"), tmp_path / "out", tmp_path / "back"
    assert tightfit("shard", model, out, "-tp", "2").returncode == 0
    assert tightfit("merge", out, back).returncode == 0
    done = tightfit("verify", back, "--against", model)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"verified: {back} holds what {model} does: ")
    alone = tightfit("verify", back)
    assert alone.returncode == 2
    assert "--against MODEL compares it with another" in alone.stderr

    path = back / "model.safetensors"
    tensors = load_file(path)
    name, *_, last = sorted(tensors)
    tensors[name].view(-1)[0] += 1
    tensors["more"] = tensors.pop(last)
    save_file(tensors, path)
    done = tightfit("verify", back, "--against", model, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["ok"]) == (1, False)
    lacks, more, differs = document["problems"]
    assert f"lacks {last!r}" in lacks
    assert "has no 'more'" in more
    assert differs.startswith(f"model.safetensors: {name!r} differs from ")


def test_json(tiny_model: TinyModel, tmp_path: Path) -> None:
    dry = tightfit("shard", tiny_model("llama"), tmp_path / "out", "--dry-run", "--json")
    assert dry.returncode == 0
    assert list(tmp_path.iterdir()) == []
    done = tightfit("shard", tiny_model("llama"), tmp_path / "out", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document == json.loads(dry.stdout) | {"written": True}
    (file,) = document["files"]
    assert file["nbytes"] == document["total_bytes"]
    assert file["nbytes"] == (tmp_path / "out" / file["name"]).stat().st_size
    assert document["layout"] == "vllm-0.32"


def test_quiet(tiny_model: TinyModel, tmp_path: Path) -> None:
    done = tightfit("shard", tiny_model("llama"), tmp_path / "out", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-tp", "0"], "--tensor-parallel-size 0 is out of range"),
        (["-tp", "9999"], "--tensor-parallel-size 9999 is out of range"),
        (["-tp", "3"], "tensor parallel size 3 does not divide num_attention_heads = 4"),
        (["--max-shard-size", "1KB"], "--max-shard-size 1KB is too small"),
        (["--max-shard-size", "big"], "'big' is not a size"),
        (["--layout", "old"], "unknown layout 'old'"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    done = tightfit("shard", tiny_model("llama"), tmp_path / "out", *arguments)
    assert_error(done, 2, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "size", "message", "sizes"),
    [
        ({}, 3, "num_attention_heads = 4", "1, 2, 4"),
        (
            {
                "hidden_size": 192,
                "head_dim": 16,
                "num_attention_heads": 12,
                "num_key_value_heads": 4,
                "intermediate_size": 240,
            },
            6,
            "the 4 groups (KV heads) of num_attention_heads = 12: one has to divide the other",
            "1, 2, 4",
        ),
        ({"intermediate_size": 250}, 4, "intermediate_size = 250", "1, 2"),
        (
            {"num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 2},
            128,
            "the padded vocabulary = 320",
            "1, 2, 4, 8, 16, 32, 64",
        ),
    ],
)
def test_dry_run_says_which_sizes_would_do(
    config: dict[str, int],
    size: int,
    message: str,
    sizes: str,
    tiny_model: TinyModel,
    tmp_path: Path,
) -> None:
    """Before any work, and of the config alone: not one weight has to be there."""
    base = json.loads((tiny_model("llama") / "config.json").read_bytes())
    model = write_random_model(base | config, tmp_path / "model", seed=1)
    done = tightfit("shard", model, tmp_path / "out", "-tp", str(size), "--dry-run")
    assert done.returncode == 2
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert str(size) in error
    assert hint.startswith(f"hint: tensor parallel sizes that work: {sizes}")
    assert not (tmp_path / "out").exists()


def test_dry_run_says_what_loads_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    done = tightfit("shard", tiny_model("llama"), tmp_path / "out", "-tp", "4", "--dry-run")
    assert done.returncode == 0
    assert " ".join(done.stdout.split()).endswith(
        "vLLM 0.32 to 0.33 would load it with --load-format sharded_state --tensor-parallel-size 4"
    )
    assert not (tmp_path / "out").exists()


def test_outputs_that_exist(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = tightfit("shard", tiny_model("llama"), tmp_path)
    assert_error(done, 2, f"the output directory {tmp_path} is not empty")
    done = tightfit("shard", tiny_model("llama"), tmp_path / "mine")
    assert_error(done, 2, f"the output {tmp_path / 'mine'} is an existing file")


def test_sources_without_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(tiny_model("llama") / "config.json", model)
    done = tightfit("shard", model, tmp_path / "out")
    assert_error(done, 2, "model has no weights")
    (model / "pytorch_model.bin").write_bytes(b"x")
    done = tightfit("shard", model, tmp_path / "out")
    assert_error(
        done,
        2,
        "model has its weights in 'pytorch_model.bin', and tightfit reads safetensors only",
    )


def test_across_and_back(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, two, one = tiny_model("llama"), tmp_path / "two", tmp_path / "one"
    assert tightfit("shard", model, two, "-tp", "2").returncode == 0
    assert tightfit("shard", two, one).returncode == 0
    done = tightfit("verify", one, "--against", model)
    assert (done.returncode, done.stderr) == (0, "")
    dry = tightfit("merge", one, tmp_path / "back", "--dry-run", "--json")
    assert not (tmp_path / "back").exists()
    done = tightfit("merge", one, tmp_path / "back", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document == json.loads(dry.stdout) | {"written": True}
    assert [file["name"] for file in document["files"]] == ["model.safetensors"]
    done = tightfit("merge", two, tmp_path / "again")
    assert done.stdout.startswith("wrote 21 tensors, ")
    assert done.stdout.endswith(f"in 1 file to {tmp_path / 'again'}, from 2 ranks of {two}\n")
    done = tightfit("merge", model, tmp_path / "other")
    assert_error(done, 2, "llama is not sharded: there is nothing to merge")
    done = tightfit("merge", tmp_path / "nothing", tmp_path / "other")
    assert_error(done, 2, f"there is no directory {tmp_path / 'nothing'}")


def test_verify_refuses(tiny_model: TinyModel, tmp_path: Path) -> None:
    done = tightfit("verify", tmp_path / "nothing")
    assert_error(done, 2, f"there is no directory {tmp_path / 'nothing'}")
    done = tightfit("verify", tmp_path)
    assert_error(
        done,
        1,
        f"{tmp_path} has no tightfit-manifest.json: it is not a complete output of `tightfit "
        "shard`",
    )
    assert tightfit("shard", tiny_model("llama"), tmp_path / "out", "-tp", "2").returncode == 0
    done = tightfit("verify", tmp_path / "out", "-tp", "4")
    assert_error(done, 1, f"{tmp_path / 'out'} was sharded for tensor parallel size 2, not 4")


def test_verify_says_what_else_it_is(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    done = tightfit("verify", model)
    assert_error(
        done,
        2,
        f"{model} is a plain checkpoint (model.safetensors), and not an output of `tightfit shard`",
    )
    assert tightfit("shard", model, out, "-tp", "2").returncode == 0
    (out / "tightfit-manifest.json").unlink()
    done = tightfit("verify", out)
    assert_error(
        done,
        1,
        f"{out} has rank files for tensor parallel size 2, but no tightfit-manifest.json that "
        "vouches for them",
    )


def test_ranks_one_by_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    done = tightfit("shard", model, out, "-tp", "4", "--ranks", "0-1,3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "for 3 of 4 ranks" in done.stdout
    assert done.stdout.endswith("not whole yet; missing ranks: 2\n")
    lacking = f"{out} is not whole: of 4 ranks it lacks 2"
    assert_error(tightfit("verify", out), 1, lacking)
    assert_error(tightfit("run", out, "--prompt", "x"), 1, lacking)
    done = tightfit("shard", model, out, "-tp", "4", "--ranks", "2", "--json")
    assert json.loads(done.stdout)["missing_ranks"] == []
    assert tightfit("verify", out, "--against", model).returncode == 0
    assert tightfit("shard", model, out, "-tp", "4", "--resume").returncode == 0
    done = tightfit("shard", model, tmp_path / "other", "-tp", "2", "--ranks", "2")
    assert_error(done, 2, "there is no rank 2")
    done = tightfit("shard", model, tmp_path / "other", "-tp", "2", "--ranks", "all")
    assert_error(done, 2, "'all' does not name ranks")


def test_harmful_names_in_a_manifest(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Problems quote names that strangers wrote."""
    out = tmp_path / "out"
    assert tightfit("shard", tiny_model("llama"), out).returncode == 0
    path = out / "tightfit-manifest.json"
    document = json.loads(path.read_bytes())
    document["files"][0]["name"] = "model\x1b]0;owned\x07.safetensors"
    path.write_text(json.dumps(document))
    done = tightfit("verify", out)
    assert done.returncode == 1
    assert all(c.isprintable() or c == "\n" for c in done.stdout)


def test_what_is_there_already(tmp_path: Path) -> None:
    """No second time, and not for another model of the same shapes."""
    model, other = (
        write_random_model(LLAMA, tmp_path / name, seed=seed)
        for seed, name in enumerate(("model", "other"))
    )
    out, back = tmp_path / "out", tmp_path / "back"
    for done in (
        tightfit("shard", model, out, "-tp", "2"),
        tightfit("merge", out, back, "--json"),
        tightfit("merge", out, back, "--resume", "--json"),
        tightfit("shard", model, out, "-tp", "2", "--resume", "--json"),
    ):
        assert (done.returncode, done.stderr) == (0, "")
        if done.stdout.startswith("{"):
            assert json.loads(done.stdout)["written"] is ("--resume" not in done.args)
    done = tightfit("shard", model, out, "-tp", "2", "--resume")
    assert f"\n{out} holds all of it already: 2 files, " in done.stdout
    assert f"next: vllm serve {out}" in done.stdout
    done = tightfit("merge", out, back, "--resume")
    assert done.stdout.startswith(f"{back} holds all of it already, byte for byte: ")
    done = tightfit("shard", other, out, "-tp", "2", "--resume")
    assert_error(
        done,
        2,
        f"{out} holds the work of another call: the model has other weights (model-rank-0-part-0."
        "safetensors: 'model.embed_tokens.weight' differs from other)",
    )
    (back / "config.json").unlink()
    (back / "tightfit-merge.journal").write_text("")
    done = tightfit("verify", back)
    assert_error(done, 1, f"{back} is an unfinished output of `tightfit merge`")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    model = write_random_model(LLAMA, tmp_path / os.fsdecode(b"model\xff"), seed=1)
    out, back = (tmp_path / os.fsdecode(name) for name in (b"out\xff", b"back\xff"))
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for command in (
        ("shard", model, out, "-tp", "2"),
        ("verify", out, "--against", model),
        ("merge", out, back),
        ("shard", model, out, "-tp", "2", "--resume"),
    ):
        done = tightfit(*command, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\\udcff" in done.stdout
    (out / "more.safetensors").write_bytes(b"")
    done = tightfit("verify", out, env=env)
    assert done.stdout.endswith("out\\udcff\n")


@pytest.mark.parametrize(
    "command",
    [("merge", "LONG", "out"), ("verify", "LONG"), ("plan", "LONG"), ("merge", "m", "LONG")],
)
def test_names_that_no_file_may_have(command: tuple[str, ...], tmp_path: Path) -> None:
    write_random_model(LLAMA, tmp_path / "m", seed=1)
    done = tightfit(*(word.replace("LONG", 256 * "x") for word in command), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
