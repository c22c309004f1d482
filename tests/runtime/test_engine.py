"""The engine with a real worker on a CPU, and with one whose tokens are known late, as on a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.ranks import MAX_TOKENS, PROMPTS, open_session
from tightfit.runtime.batch import UNKNOWN, Span, Step
from tightfit.runtime.engine import Engine
from tightfit.runtime.options import SamplingParams

TinyModel = Callable[[str], Path]
Tokens = Callable[[Path], list[list[int]]]


class LateWorker:
    """A worker that keeps the last token of every row to itself, and lets two steps be in flight.

    It counts the tokens that are computed.
    """

    def __init__(self, worker: Any, depth: int) -> None:
        self.options = worker.options
        self.depth = depth
        self.num_computed = 0
        self._worker = worker
        self._last: dict[int, int] = {}

    def submit(self, step: Step) -> Any:
        token_ids, unknown = list(step.token_ids), 0
        for i, span in enumerate(step.spans):
            # Such tokens are alone, and single tokens come first.
            if token_ids[i] == UNKNOWN:
                token_ids[i] = self._last[span.row]
                unknown += 1
            if span.count > 1:
                break
        assert token_ids.count(UNKNOWN) == 0
        assert self.depth > 1 or not unknown
        self.num_computed += len(token_ids)
        sampled = self._worker.submit(
            Step(spans=step.spans, token_ids=token_ids, samples=step.samples)
        )
        for (i, _), token in zip(step.samples, sampled.tokens(), strict=True):
            self._last[step.spans[i].row] = token
        return sampled


def make(model: Path, depth: int, **changes: Any) -> tuple[Engine, LateWorker]:
    worker = LateWorker(open_session(model, **changes).engine.worker, depth)
    return Engine(worker), worker  # type: ignore[arg-type]


def answers(engine: Engine, prompts: Any, **params: Any) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in prompts]
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, **params)
    for i, prompt in enumerate(prompts):
        engine.add(i, prompt, sampling)
    for output in engine.stream():
        tokens[output.request_id].append(output.token_id)
    assert engine.pool_is_whole()
    return tokens


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_are_those_of_transformers(
    depth: int, enable_prefix_caching: bool, tiny_model: TinyModel, reference_tokens: Tokens
) -> None:
    path = tiny_model("llama")
    engine, worker = make(
        path,
        depth,
        enable_prefix_caching=enable_prefix_caching,
        num_blocks=14,
        max_num_batched_tokens=16,
    )
    expected = reference_tokens(path)
    assert answers(engine, PROMPTS) == expected
    assert engine.scheduler.num_preemptions > 0
    first = worker.num_computed
    # Again: what is still in the cache is not computed.
    assert answers(engine, PROMPTS) == expected
    second = worker.num_computed - first
    hits = engine.scheduler.prefix_cache_hits
    assert second < first if enable_prefix_caching else second == first
    assert (hits > 0) == enable_prefix_caching


@pytest.mark.parametrize("depth", [1, 2])
def test_found_prefixes_are_not_computed_and_change_no_token(
    depth: int, tiny_model: TinyModel, reference_tokens: Tokens
) -> None:
    path = tiny_model("llama")
    engine, worker = make(path, depth)
    expected = reference_tokens(path)[0]
    (tokens,) = answers(engine, PROMPTS[:1])
    assert tokens == expected
    computed = worker.num_computed
    assert computed == len(PROMPTS[0]) + MAX_TOKENS - 1
    # A conversation goes on: its beginning, which was computed, is there.
    engine.add(0, [*PROMPTS[0], *expected[:10]], SamplingParams(max_tokens=10, ignore_eos=True))
    assert [o.token_id for o in engine.stream()] == expected[10:]
    assert engine.scheduler.prefix_cache_hits == 32
    assert worker.num_computed - computed == len(PROMPTS[0]) + 10 - 32 + 9


def test_random_tokens_depend_on_neither_depth_nor_what_is_cached(tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    found = []
    for depth in (1, 2):
        engine, _ = make(path, depth, max_num_seqs=3, max_num_batched_tokens=8)
        for _ in range(2):
            found.append(answers(engine, PROMPTS, temperature=1.0, seed=5))
    assert found == [found[0]] * 4


def test_requests_come_and_go_while_steps_are_in_flight(
    tiny_model: TinyModel, reference_tokens: Tokens
) -> None:
    path = tiny_model("llama")
    engine, _ = make(path, 2)
    expected = reference_tokens(path)
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    tokens: dict[int, list[int]] = {i: [] for i in range(4)}

    def steps(count: int) -> None:
        for _ in range(count):
            for output in engine.step():
                tokens[output.request_id].append(output.token_id)

    engine.add(0, PROMPTS[0], params)
    engine.add(1, PROMPTS[1], params)
    steps(3)
    engine.add(2, PROMPTS[2], params)
    steps(2)
    engine.abort(0)
    known = list(tokens[0])
    # It takes the row and the blocks of the one that was aborted.
    engine.add(3, PROMPTS[3], params)
    while engine.has_work:
        steps(1)
    assert tokens[0] == known == expected[0][: len(known)]
    assert [tokens[i] for i in (1, 2, 3)] == expected[1:]
    assert engine.pool_is_whole()


def test_a_step_that_samples_nothing_is_waited_for(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only a device's tensor has an event to wait for; without one the host would run ahead through
    # a long prompt, and write inputs over those that are still being copied.
    worker = open_session(tiny_model("llama")).engine.worker
    found: list[torch.Tensor] = []
    monkeypatch.setattr("tightfit.runtime.worker.Sampled", lambda tokens, _: found.append(tokens))
    monkeypatch.setattr(
        worker, "advance", lambda batch, _: torch.empty(len(batch.token_ids), 8, device="meta")
    )
    worker.submit(Step(spans=(Span(0, 3, [0], 0),), token_ids=[1, 2, 3], samples=()))
    assert [tokens.device.type for tokens in found] == ["meta"]


def test_what_others_left_in_a_block_counts_nothing(tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    prompts = [[5 + i] * (3 + 9 * i) for i in range(4)]
    wanted = answers(make(path, 1)[0], prompts)
    session = open_session(path)
    for keys, values in session.engine.worker.cache.layers:
        keys.fill_(float("nan"))
        values.fill_(float("nan"))
    assert answers(session.engine, prompts) == wanted
