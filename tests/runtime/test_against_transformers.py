from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.ranks import PROMPTS, all_logits, greedy, open_session, run
from support.tiny_models import NAMES
from tightfit.runtime.options import SamplingParams

TinyModel = Callable[[str], Path]
Tokens = Callable[[Path], list[list[int]]]


@pytest.mark.parametrize("name", NAMES)
def test_float32_logits_of_every_position(
    name: str, tiny_model: TinyModel, reference: Callable[[Path], Any]
) -> None:
    path = tiny_model(name)
    ours = all_logits(open_session(path), PROMPTS[0])
    with torch.no_grad():
        theirs = reference(path)(torch.tensor([PROMPTS[0]])).logits[0]
    assert ours is not None
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("length", [40, 100])
def test_longrope_uses_the_long_factors_for_a_long_context(
    length: int, tiny_model: TinyModel, reference: Callable[[Path], Any]
) -> None:
    # The original context is 64 tokens: transformers decides by the prompt, we by max_model_len.
    path = tiny_model("phi3_longrope")
    ids = [i % 250 + 3 for i in range(length)]
    session = open_session(path, max_model_len=64 if length <= 64 else 128, max_num_seqs=2)
    ours = all_logits(session, ids)
    with torch.no_grad():
        theirs = reference(path)(torch.tensor([ids])).logits[0]
    assert ours is not None
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_prompts_of_different_lengths_together(
    tiny_model: TinyModel, reference_tokens: Tokens
) -> None:
    path = tiny_model("qwen3")
    assert greedy(path) == reference_tokens(path)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "mistral", "mixtral", "olmo2"])
def test_chunked_prefill_mixed_with_decode(
    name: str, tiny_model: TinyModel, reference_tokens: Tokens
) -> None:
    path = tiny_model(name)
    assert greedy(path, max_num_batched_tokens=5) == reference_tokens(path)


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_preemption_changes_no_token(
    name: str, tiny_model: TinyModel, reference_tokens: Tokens
) -> None:
    path = tiny_model(name)
    report = run(path, num_blocks=14, max_num_batched_tokens=16)
    assert report is not None
    assert report.num_preemptions > 0
    assert [c.token_ids for c in report.completions] == reference_tokens(path)


def test_one_sequence_at_a_time(tiny_model: TinyModel, reference_tokens: Tokens) -> None:
    path = tiny_model("llama")
    assert greedy(path, max_num_seqs=1) == reference_tokens(path)


def test_sixteen_bits_stay_close(tiny_model: TinyModel, reference: Callable[[Path], Any]) -> None:
    for name in ("llama", "gemma3", "granite", "olmo2", "mixtral"):
        path = tiny_model(name)
        ours = all_logits(open_session(path, dtype="BF16"), PROMPTS[0])
        with torch.no_grad():
            theirs = reference(path)(torch.tensor([PROMPTS[0]])).logits[0]
        assert ours is not None
        assert ours.dtype == torch.float32
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 0.05, f"{name}: {error}"


def test_stops_at_the_end_token_of_the_config(
    tiny_model: TinyModel, reference_tokens: Tokens
) -> None:
    path = tiny_model("llama")
    session = open_session(path)
    expected = reference_tokens(path)[0]
    stop = expected[7]
    session.engine.add(0, PROMPTS[0], SamplingParams(max_tokens=20), frozenset([stop]))
    outputs = list(session.engine.stream())
    assert [o.token_id for o in outputs] == expected[: expected.index(stop) + 1]
    assert outputs[-1].finish_reason == "stop"
    assert session.engine.pool.num_free == session.engine.pool.num_blocks
