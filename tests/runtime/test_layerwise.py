from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.tiny_models import NAMES
from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoint.source import LocalSource
from tightfit.errors import CheckpointError, UnsupportedModelError
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize.job import prepare
from tightfit.runtime import layerwise
from tightfit.runtime.layerwise import LayerwiseModel

TinyModel = Callable[[str], Path]
TOKENS = torch.tensor([[(7 * i * i + 11 * i + j) % 250 + 3 for i in range(40)] for j in range(3)])


def last(model: LayerwiseModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    hidden = model.embed(tokens)
    for i in range(model.num_layers):
        hidden = model.layer(i)(hidden)
    return hidden


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(str(path))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(
    name: str,
    tiny_model: TinyModel,
    reference: Callable[[Path], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layerwise, "_TABLE_ELEMENTS", 100 * 128)
    path = tiny_model(name)
    model = LayerwiseModel(opened(path))
    hidden = last(model)
    with torch.no_grad():
        theirs = reference(path)(TOKENS).logits
    torch.testing.assert_close(model.logits(hidden), theirs, atol=1e-3, rtol=1e-4)
    expected = theirs[:, :-1].log_softmax(dim=-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
    ours = model.log_likelihood(hidden[:, :-1], TOKENS[:, 1:])
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3_moe", "gemma2"])
def test_linear_layers_are_seen_by_the_names_of_the_checkpoint(
    name: str, tiny_model: TinyModel
) -> None:
    checkpoint = opened(tiny_model(name))
    model = LayerwiseModel(checkpoint)
    layer = model.layer(0)
    hidden = model.embed(TOKENS)
    seen: dict[str, torch.Tensor] = {}

    def watch(modules: tuple[str, ...], x: torch.Tensor) -> None:
        for module in modules:
            seen[module] = x.clone()

    layer.watch(watch)
    after = layer(hidden)
    wish = Wish(default=Choice(scheme="fp8-channel"))
    quantized = {
        m.module: m for m in prepare(checkpoint, wish).matrices if ".layers.0." in m.module
    }
    assert set(layer.linears) == set(quantized)
    assert set(seen) <= set(quantized)
    for module, matrix in quantized.items():
        assert layer.linears[module].shape == (matrix.rows, matrix.columns)
        if module in seen:
            assert seen[module].shape[1] == matrix.columns
    layer.watch(None)
    seen.clear()
    assert torch.equal(layer(hidden), after)
    assert not seen


def test_weights_and_inputs_can_be_replaced(tiny_model: TinyModel) -> None:
    model = LayerwiseModel(opened(tiny_model("llama")))
    layer = model.layer(1)
    hidden = model.embed(TOKENS)
    after = layer(hidden)
    name = "model.layers.1.mlp.down_proj"
    layer.watch(lambda modules, x: x * 2 if name in modules else None)
    assert not torch.allclose(layer(hidden), after)
    layer.linears[name].mul_(0.5)
    torch.testing.assert_close(layer(hidden), after)
    assert layer.parameters[f"{name}.weight"] is layer.linears[name]
    again = model.layer(1)
    torch.testing.assert_close(again(hidden), after)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_without_a_row(token: int, tiny_model: TinyModel) -> None:
    model = LayerwiseModel(opened(tiny_model("llama")))
    with pytest.raises(CheckpointError, match=f"the token {token} has no row in the embedding"):
        model.embed(torch.tensor([[5, token]]))


class Distant(LocalSource):
    def local_path(self, path: str) -> Any:
        return None


def test_a_checkpoint_that_is_not_here(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_TABLE_ELEMENTS", 100 * 128)
    path = tiny_model("qwen3_moe")
    here = opened(path)
    distant = replace(here, source=Distant(path, str(path)))
    one, two = LayerwiseModel(here), LayerwiseModel(distant)
    assert torch.equal(one.logits(last(one)), two.logits(last(two)))


def test_families_that_the_runtime_cannot_execute(tiny_model: TinyModel) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot execute"):
        LayerwiseModel(opened(tiny_model("gpt2")))
