from collections.abc import Callable
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch

from support.quantizing import CHOICES, quantize
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.demo.tiny import tiny_checkpoint
from tightfit.errors import CheckpointError, UsageError
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize.evaluate import perplexity, window_losses
from tightfit.quantize.job import prepare
from tightfit.runtime.layerwise import LayerwiseModel

TEXT = "The sun is a star, and stars are far away. " * 12
WINDOWS = torch.tensor([[(7 * i * i + 11 * i + j) % 250 + 3 for i in range(24)] for j in range(5)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("evaluate") / "tiny")


def transformers_losses(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in WINDOWS]
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_losses_are_those_of_transformers(name: str, tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model(name)
    losses = window_losses(LayerwiseModel(open_checkpoint(str(path))), WINDOWS)
    torch.testing.assert_close(losses, transformers_losses(path), atol=1e-4, rtol=1e-4)


def test_windows_do_not_overlap_and_their_spread_is_told(tiny: Path) -> None:
    checkpoint = open_checkpoint(str(tiny))
    told: list[tuple[int, int]] = []
    found = perplexity(
        checkpoint, TEXT, window=64, progress=lambda done, total: told.append((done, total))
    )
    assert (found.windows, found.tokens) == (8, 8 * 63)
    assert found.value == pytest.approx(exp(found.nll))
    assert found.error == pytest.approx(found.value * found.nll_error)
    assert told == [(i, 4) for i in range(5)]
    ids = torch.tensor(list(range(3, 67)))[None]
    assert window_losses(LayerwiseModel(checkpoint), ids).shape == (1,)
    part = perplexity(checkpoint, TEXT, window=64, limit_tokens=70)
    assert (part.windows, part.tokens, part.nll_error) == (1, 63, 0)
    short = perplexity(checkpoint, TEXT, window=512, limit_tokens=20)
    assert (short.windows, short.tokens) == (1, 19)


def test_quantized_checkpoints_are_near_and_4_bits_further_than_8(
    tiny: Path, tmp_path: Path
) -> None:
    plain = perplexity(open_checkpoint(str(tiny)), TEXT, window=64)
    distance = {}
    for label in ("w8a16 g64", "w4a16 g32", "mxfp4", "int8"):
        out = tmp_path / label.replace(" ", "-")
        quantize(tiny, out, CHOICES[label])
        found = perplexity(open_checkpoint(str(out)), TEXT, window=64)
        distance[label] = abs(found.nll - plain.nll)
        assert distance[label] < 0.5
    assert distance["w8a16 g64"] < distance["w4a16 g32"]
    assert plain.windows == 8


def test_what_is_not_written_yet_can_be_judged(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny))
    choice = Choice(scheme="w4a16", group_size=32)
    virtual = prepare(checkpoint, Wish(default=choice)).virtual
    quantize(tiny, tmp_path / "out", choice)
    written = open_checkpoint(str(tmp_path / "out"))
    found = [perplexity(one, TEXT, window=64).nll for one in (virtual, written)]
    assert found[0] == found[1]


def test_what_cannot_be_judged(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny))
    with pytest.raises(UsageError, match="the text has 0 tokens"):
        perplexity(checkpoint, "")
    with pytest.raises(UsageError, match="a window of 1 tokens"):
        perplexity(checkpoint, TEXT, window=1)
    with pytest.raises(CheckpointError):
        perplexity(replace(checkpoint, has_weights=False), TEXT)
