"""Every family gives on a GPU the tokens that it gives on a CPU, where transformers judges."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from runtime.ranks import PROMPTS, all_logits, decoded_logits, greedy, open_session
from runtime.test_families import EXECUTED, GENERATED
from support.tiny_models import NAMES
from tightfit.runtime.ranks.world import World
from tightfit.runtime.session import Session

TinyModel = Callable[[str], Path]
Logits = Callable[[Session, Sequence[int]], torch.Tensor]
GRAPHS = {"cudagraph_capture_sizes": (1, 2, 4)}


@pytest.fixture
def gpu() -> Iterator[World]:
    torch.backends.cuda.matmul.allow_tf32 = False
    yield World.from_environment("cuda")
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", [*NAMES, *EXECUTED])
def test_float32_logits(name: str, tiny_model: TinyModel, gpu: World) -> None:
    path = tiny_model(name)
    ours = all_logits(open_session(path, gpu, block_size=16), PROMPTS[0])
    theirs = all_logits(open_session(path), PROMPTS[0])
    torch.testing.assert_close(ours.cpu(), theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("graphs", [{}, GRAPHS], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma2", "gemma3", "mistral", "qwen3_moe", *GENERATED]
)
def test_greedy_tokens(name: str, graphs: dict, tiny_model: TinyModel, gpu: World) -> None:
    path = tiny_model(name)
    assert greedy(path, gpu, block_size=16, **graphs) == greedy(path)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chunks_beside_decodes(name: str, tiny_model: TinyModel, gpu: World) -> None:
    path = tiny_model(name)
    found = greedy(path, gpu, block_size=16, max_num_batched_tokens=5, **GRAPHS)
    assert found == greedy(path)


def test_preempted_sequences(tiny_model: TinyModel, gpu: World) -> None:
    path = tiny_model("llama3")
    found = greedy(path, gpu, block_size=16, num_blocks=4, max_num_batched_tokens=16, **GRAPHS)
    assert found == greedy(path)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="Triton does not convert e4m3 here",
)
@pytest.mark.parametrize("logits", [all_logits, decoded_logits])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "minicpm3", "deepseek_v3"])
def test_an_fp8_cache(name: str, logits: Logits, tiny_model: TinyModel, gpu: World) -> None:
    """What is stored may differ in its last bit, where a number is between two of e4m3."""
    path = tiny_model(name)
    changes = {"kv_cache_dtype": "F8_E4M3", "block_size": 16}
    ours = logits(open_session(path, gpu, **changes), PROMPTS[0])
    theirs = logits(open_session(path, **changes), PROMPTS[0])
    torch.testing.assert_close(ours.cpu(), theirs, atol=1e-2, rtol=1e-2)
