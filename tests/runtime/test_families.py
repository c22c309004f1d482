"""Every tiny family either gives transformers' logits and tokens, alone and cut, or is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runtime.ranks import PROMPTS, all_logits, greedy, open_session
from runtime.test_ranks import on_ranks
from support.tiny_families import FAMILIES
from support.tiny_models import make_tiny_model
from support.work import write_shards
from tightfit.errors import UnsupportedModelError

TinyModel = Callable[[str], Path]
Reference = Callable[[Path], Any]

REFUSED = {
    "phimoe": "experts chosen by a sparse mixer",
    "llama4": "norms of queries and keys without weights, and a temperature",
    "dbrx": "clip_qkv",
    "opt_350m": "norms of the residual stream itself",
    "falcon_rw": "alibi",
    "bloom": "transformer.word_embeddings_layernorm.weight beside the layers",
    "mpt": "alibi",
    "apertus": "XIELU in layers",
    "lfm2": "layers of ShortConv",
    "mamba": "layers of Mamba1",
    "jamba": "layers of Mamba1",
    "qwen3_next": "layers of GatedDeltaNet",
}
HYBRIDS = ("mamba2", "granitemoehybrid", "falcon_h1", "bamba")
"""Some of these run as well: `test_hybrids`."""
EXECUTED = tuple(name for name in FAMILIES if name not in (*REFUSED, *HYBRIDS))
CUT = (
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "minicpm3",
    "glm4_moe",
    "qwen2_moe",
    "granitemoeshared",
    "gpt2",
    "gpt_neox",
    "falcon",
    "cohere_plus",
    "olmo",
)
"""Whose rank files are tried as well."""
# transformers ignores norm_topk_prob here, which DeepSeek's own code and vLLM do not.
OTHERS = {"deepseek_v2": {"norm_topk_prob": False}}
GENERATED = ("gpt_oss", "deepseek_v2", "deepseek_v3", "minicpm3", "cohere2", "falcon", "gpt2")


@pytest.fixture(scope="module")
def family(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    root = tmp_path_factory.mktemp("families")

    def make(name: str) -> Path:
        if name not in OTHERS:
            return tiny_model(name)
        path = root / name
        return path if path.exists() else make_tiny_model(name, path, others=OTHERS[name])

    return make


def assert_close(ours: torch.Tensor | None, theirs: torch.Tensor) -> None:
    assert ours is not None
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def expected(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([PROMPTS[0]])).logits[0]
    return found


@pytest.mark.parametrize("name", EXECUTED)
def test_float32_logits_of_every_position(
    name: str, family: TinyModel, reference: Reference
) -> None:
    path = family(name)
    assert_close(all_logits(open_session(path), PROMPTS[0]), expected(reference(path)))


@pytest.mark.parametrize("name", GENERATED)
def test_tokens_with_chunks_of_prompts(
    name: str, family: TinyModel, reference_tokens: Callable[[Path], list[list[int]]]
) -> None:
    path = family(name)
    assert greedy(path, max_num_batched_tokens=5) == reference_tokens(path)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_feature(name: str, tiny_model: TinyModel) -> None:
    path = tiny_model(name)
    with pytest.raises(UnsupportedModelError) as e:
        open_session(path)
    architecture = json.loads((path / "config.json").read_bytes())["architectures"][0]
    assert e.value.message.endswith(f" cannot execute {architecture}: {REFUSED[name]}")


@pytest.fixture(scope="module")
def two_ranks(family: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits of two ranks for all families, plain and cut, from one launch."""
    root = tmp_path_factory.mktemp("cut")
    paths = [family(name) for name in EXECUTED]
    for name in CUT:
        write_shards(family(name), root / f"{name}-cut", 2, layout="builtin")
        paths.append(root / f"{name}-cut")
    return on_ranks(2, paths, tmp_path_factory.mktemp("two"), only_logits=True)


@pytest.mark.parametrize("name", EXECUTED)
def test_two_ranks_give_what_one_gives(name: str, family: TinyModel, two_ranks: Path) -> None:
    alone = all_logits(open_session(family(name)), PROMPTS[0])
    assert alone is not None
    for cut in ("", "-cut"):
        if cut and name not in CUT:
            continue
        assert_close(load_file(two_ranks / f"{name}{cut}.safetensors")["logits"], alone)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v2", "glm4_moe", "starcoder2", "cohere2"])
def test_sixteen_bits_stay_close(name: str, family: TinyModel, reference: Reference) -> None:
    path = family(name)
    ours = all_logits(open_session(path, dtype="BF16"), PROMPTS[0])
    theirs = expected(reference(path))
    assert ours is not None
    assert (ours - theirs).norm() / theirs.norm() < 0.05
