"""Calibration text, and the windows that are drawn from it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors

from support.seeded_models import LLAMA, write_seeded_model
from support.words import write_word_tokenizer
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.errors import UsageError
from tightfit.quantize.calibration import CalibrationOptions, samples
from tightfit.quantize.calibration.samples import token_windows

WORDS = 259


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = write_seeded_model(LLAMA, tmp_path_factory.mktemp("llama") / "model")
    write_word_tokenizer(model, WORDS)
    return model


def options_for(path: Path, **changes: Any) -> CalibrationOptions:
    return CalibrationOptions(texts=(path,), **{"samples": 4, "length": 16, **changes})


def test_samples_are_drawn_by_the_seed(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i % WORDS}" for i in range(3000)))
    found = token_windows(checkpoint, options_for(path))
    assert found.shape == (4, 16)
    assert (found.diff(dim=1) % WORDS == 1).all()
    assert torch.equal(found, token_windows(checkpoint, options_for(path)))
    assert not torch.equal(found, token_windows(checkpoint, options_for(path, seed=1)))
    warnings: list[str] = []
    every = token_windows(checkpoint, options_for(path, samples=1000), warnings.append)
    assert every.shape == (3000 // 16, 16)
    assert "187 samples" in warnings[0]
    assert torch.equal(every.flatten() % WORDS, torch.arange(187 * 16) % WORDS)


def test_lines_of_json_are_documents(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " ".join(["w7"] * 40)}), "", json.dumps({"text": "w8 " * 40})]
    path.write_text("\n".join(lines))
    assert set(token_windows(checkpoint, options_for(path)).flatten().tolist()) == {7, 8}
    for bad in ('{"text": 3}', "[1]", "{", "[" * 10_000):
        path.write_text("\n".join([*lines, bad]))
        with pytest.raises(UsageError, match="line 4 of"):
            token_windows(checkpoint, options_for(path))


def test_lines_end_where_json_says(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    path = tmp_path / "text.JSONL"
    text = "\u2028w7 \x85" * 40
    path.write_text(
        "\r\n".join([json.dumps({"text": text}, ensure_ascii=False)] * 2), encoding="utf-8-sig"
    )
    found = token_windows(checkpoint, options_for(path))
    assert 7 in found.flatten().tolist()


def test_long_texts_are_read_to_the_last_whole_line(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two bytes each, there are half as many characters."""
    line = json.dumps({"text": "ж w7 " * 20}, ensure_ascii=False).encode() + b"\n"
    path = tmp_path / "text.jsonl"
    path.write_bytes(line * 10)
    checkpoint = open_checkpoint(str(llama))
    whole = {}
    for limit in range(len(line) * 3 - 2, len(line) * 3 + 14):
        monkeypatch.setattr(samples, "_LARGEST_BYTES", limit)
        whole[limit] = token_windows(checkpoint, options_for(path, samples=1000)).numel()
    path.write_bytes(line * 3)
    every = options_for(path, samples=1000)
    assert whole[len(line) * 3] == token_windows(checkpoint, every).numel()
    # A text is cut in a character, and not refused.
    text = tmp_path / "text.txt"
    text.write_text("w7 ж " * 100)
    for limit in (203, 204, 205):
        monkeypatch.setattr(samples, "_LARGEST_BYTES", limit)
        token_windows(checkpoint, options_for(text, samples=1))


def test_what_is_no_text_is_refused(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 w1 \xff\xfe" + b"w2 " * 300)
    with pytest.raises(UsageError, match=r"parquet is no UTF-8: invalid start byte at byte 8"):
        token_windows(checkpoint, options_for(path))
    path.write_bytes(b"w2 " * 300 + "ж".encode()[:1])
    with pytest.raises(UsageError, match="unexpected end of data"):
        token_windows(checkpoint, options_for(path))


def test_texts_that_cannot_be_used_are_refused(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    path = tmp_path / "text.txt"
    path.write_text("w1 w2 w3")
    with pytest.raises(UsageError, match="has 3 tokens"):
        token_windows(checkpoint, options_for(path))
    with pytest.raises(UsageError, match="cannot read"):
        token_windows(checkpoint, options_for(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match="none was given"):
        CalibrationOptions(texts=())
    with pytest.raises(UsageError, match="0 calibration samples"):
        options_for(path, samples=0)


@pytest.mark.parametrize("place", ["config", "tokenizer"])
def test_texts_begin_as_the_model_expects(place: str, llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    settings = {"bos_token": "w5"} | ({"add_bos_token": True} if place == "config" else {})
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    if place == "tokenizer":
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="w5 $A", special_tokens=[("w5", 5)]
        )
        tokenizer.save(str(model / "tokenizer.json"))
    path = tmp_path / "text.txt"
    path.write_text("w1 " * 300)
    found = token_windows(open_checkpoint(str(model)), options_for(path))
    assert (found[:, 0] == 5).all()
    assert (found[:, 1:] == 1).all()
