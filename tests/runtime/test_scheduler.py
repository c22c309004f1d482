"""The schedule, with a mock of the model: the next token is a function of all tokens before."""

import random
from collections.abc import Sequence

import pytest

from tightfit.errors import UsageError
from tightfit.runtime.blocks import BlockPool
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.scheduler import Scheduler


def make(**changes: int) -> Scheduler:
    values = {
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "num_blocks": 32,
        "block_size": 4,
    }
    options = EngineOptions(dtype="F32", **(values | changes))
    return Scheduler(options, BlockPool(options.num_blocks, options.block_size))


def next_token(tokens: Sequence[int]) -> int:
    return (sum((i + 1) * token for i, token in enumerate(tokens)) * 31 + len(tokens)) % 997


def expected(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def run(scheduler: Scheduler) -> dict[int, list[int]]:
    """Execute like a model with a cache: a token can be seen only if its slot was written."""
    options, cache = scheduler.options, {}
    generated: dict[int, list[int]] = {}
    while scheduler.has_work:
        chunks = scheduler.schedule()
        assert sum(chunk.count for chunk in chunks) <= options.max_num_batched_tokens
        assert len(scheduler.running) <= options.max_num_seqs
        held = [block for s in scheduler.running for block in s.blocks]
        assert len(held) == len(set(held))
        assert len(held) + scheduler.pool.num_free == scheduler.pool.num_blocks
        sampled = []
        for chunk in chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.num_computed
            for position in range(chunk.start + chunk.count):
                block = sequence.blocks[position // options.block_size]
                slot = block, position % options.block_size
                if position >= chunk.start:
                    cache[slot] = sequence.tokens[position]
                assert cache[slot] == sequence.tokens[position]
            if chunk.samples:
                sampled.append(next_token(sequence.tokens))
        for output in scheduler.update(chunks, sampled):
            generated.setdefault(output.request_id, []).append(output.token_id)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    return generated


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_requests_gives_what_each_gives_alone(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make(
        max_num_batched_tokens=rng.randint(4, 40),
        num_blocks=rng.randint(16, 40),
        max_num_seqs=rng.randint(1, 4),
    )
    wanted: dict[int, list[int]] = {}
    for request_id in range(12):
        prompt = [rng.randrange(997) for _ in range(rng.randint(1, 40))]
        count = rng.randint(1, 24)
        scheduler.add(request_id, prompt, SamplingParams(max_tokens=count))
        wanted[request_id] = expected(prompt, count)
    assert run(scheduler) == wanted


def test_the_last_arrived_is_preempted() -> None:
    scheduler = make(num_blocks=8, max_num_batched_tokens=64)
    for request_id in range(2):
        scheduler.add(request_id, [1] * 14, SamplingParams(max_tokens=8))
    finished = []
    while scheduler.has_work:
        chunks = scheduler.schedule()
        tokens = [next_token(c.sequence.tokens) for c in chunks if c.samples]
        outputs = scheduler.update(chunks, tokens)
        finished += [o.request_id for o in outputs if o.finish_reason]
    assert scheduler.num_preemptions == 1
    assert finished == [0, 1]


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(0, [1, 2], SamplingParams(max_tokens=10))
    scheduler.update(scheduler.schedule(), [7])
    scheduler.add(1, [3] * 20, SamplingParams(max_tokens=2))
    sizes = []
    for _ in range(3):
        chunks = scheduler.schedule()
        sizes.append([(c.sequence.request_id, c.count) for c in chunks])
        scheduler.update(chunks, [7 for c in chunks if c.samples])
    assert sizes == [[(0, 1), (1, 7)], [(0, 1), (1, 7)], [(0, 1), (1, 6)]]


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "message"),
    [
        (0, 1, "without tokens"),
        (64, None, "do not fit in max_model_len = 64"),
        (60, 5, "do not fit in max_model_len = 64"),
        (30, 20, "need 13 blocks of KV cache, and there are 12"),
    ],
)
def test_refuses_what_can_never_finish(
    prompt_tokens: int, max_tokens: int | None, message: str
) -> None:
    scheduler = make(num_blocks=12)
    with pytest.raises(UsageError, match=message):
        scheduler.add(0, [1] * prompt_tokens, SamplingParams(max_tokens=max_tokens))
    assert not scheduler.has_work


def test_a_sequence_may_fill_all_blocks() -> None:
    scheduler = make(num_blocks=12)
    scheduler.add(0, [5] * 30, SamplingParams(max_tokens=19))
    assert run(scheduler) == {0: expected([5] * 30, 19)}


def test_options_that_cannot_work() -> None:
    with pytest.raises(UsageError, match="max_num_batched_tokens = 2 is less than"):
        make(max_num_batched_tokens=2)
    with pytest.raises(UsageError, match="0 blocks"):
        make(num_blocks=0)
    with pytest.raises(UsageError, match="top_p = 0"):
        SamplingParams(top_p=0)
