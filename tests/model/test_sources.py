"""A checkpoint holds what its config promises, or the difference is named."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from support.configs import read_spec
from support.tiny_models import NAMES
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.errors import CheckpointError
from tightfit.model.families import model_spec
from tightfit.model.sources import check_sources, source_shapes, untied


@pytest.mark.parametrize("name", NAMES)
def test_tiny_checkpoints_hold_exactly_the_sources(
    name: str, tiny_model: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(str(tiny_model(name)))
    spec = model_spec(checkpoint.config)
    tensors = checkpoint.tensors()
    assert source_shapes(spec) == {name: info.shape for name, info in tensors.items()}
    check_sources(spec, tensors, "it")


@dataclass(frozen=True)
class Fake:
    shape: tuple[int, ...]
    dtype: str = "BF16"
    nbytes: int = 0


@pytest.fixture
def tensors() -> dict[str, Fake]:
    return {name: Fake(shape) for name, shape in source_shapes(SPEC).items()}


SPEC = replace(read_spec("SmolLM2-135M"), layers=read_spec("SmolLM2-135M").layers[:2])
HEAD = "lm_head.weight"


def problem(tensors: dict[str, Fake], spec=SPEC) -> tuple[str, str | None]:
    with pytest.raises(CheckpointError) as e:
        check_sources(spec, tensors, "it")
    return e.value.message, e.value.hint


def test_missing(tensors: dict[str, Fake]) -> None:
    del tensors["model.norm.weight"]
    message, _ = problem(tensors)
    assert message == "it lacks the tensor 'model.norm.weight'"
    del tensors["model.embed_tokens.weight"]
    message, hint = problem(tensors)
    assert message == "it lacks the tensor 'model.embed_tokens.weight' and 1 more"
    assert hint == "the download is incomplete, or config.json belongs to another model"


def test_wrong_shape(tensors: dict[str, Fake]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight"] = Fake((576, 192))
    message, hint = problem(tensors)
    assert message == (
        "it: tensor 'model.layers.1.self_attn.k_proj.weight' has the shape [576, 192], and "
        "config.json says [192, 576]"
    )
    assert hint == "config.json and the weights belong to different models"


def test_unknown(tensors: dict[str, Fake]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = Fake((576,))
    message, hint = problem(tensors)
    assert message == (
        "it holds the tensor 'model.layers.0.self_attn.q_proj.bias', which LlamaForCausalLM does "
        "not have"
    )
    assert hint == "config.json belongs to another model, or misses an option such as a bias"


def test_quantized_without_saying_so(tensors: dict[str, Fake]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = replace(tensors[name], dtype="F8_E4M3")
    message, _ = problem(tensors)
    assert message == (
        f"it: tensor {name!r} has the dtype F8_E4M3, and config.json has no quantization_config"
    )


def test_old_buffers_are_ignored(tensors: dict[str, Fake]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = Fake((32,), "F32")
    check_sources(SPEC, tensors, "it")


def test_tied_with_a_head(tensors: dict[str, Fake]) -> None:
    assert untied(SPEC, tensors) is SPEC
    tensors[HEAD] = tensors["model.embed_tokens.weight"]
    check_sources(SPEC, tensors, "it")
    other = untied(SPEC, tensors)
    assert not other.tie_word_embeddings
    assert HEAD in source_shapes(other)
    check_sources(other, tensors, "it")
