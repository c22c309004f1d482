"""The schedule, with a mock of the device: the next token is a function of all tokens before."""

import random
from collections import Counter

import pytest

from support.mock_device import MockDevice, continuation
from tightfit.errors import UsageError
from tightfit.runtime.engine import Engine
from tightfit.runtime.options import EngineOptions, SamplingParams


def make(depth: int = 1, **changes: int) -> Engine:
    values = {
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "num_blocks": 32,
        "block_size": 4,
    }
    options = EngineOptions(dtype="F32", **(values | changes))
    return Engine(MockDevice(options, depth))


def step(engine: Engine, generated: dict[int, list[int]]) -> None:
    for output in engine.step():
        generated.setdefault(output.request_id, []).append(output.token_id)
    check(engine)


def check(engine: Engine) -> None:
    """Every block is free or held as often as tables list it; every row is free or has one user."""
    scheduler, pool = engine.scheduler, engine.pool
    holders = Counter(block for s in scheduler.running.values() for block in s.blocks)
    assert len(holders) + pool.num_free == pool.num_blocks
    assert not set(pool._free) & set(holders)
    assert all(pool._holders[block] == holders[block] for block in range(pool.num_blocks))
    assert all(s.row == row and not s.finished for row, s in scheduler.running.items())
    assert not any(s.blocks or s.row >= 0 for s in scheduler.waiting)
    assert len(scheduler.running) + len(scheduler._free_rows) == scheduler.options.max_num_seqs


def run(engine: Engine) -> dict[int, list[int]]:
    generated: dict[int, list[int]] = {}
    while engine.has_work:
        step(engine, generated)
    assert engine.pool_is_whole()
    assert engine.step() == []
    return generated


def add(engine: Engine, request_id: int, prompt: list[int], max_tokens: int) -> None:
    engine.add(request_id, prompt, SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(25))
def test_any_mix_of_requests_gives_what_each_gives_alone(seed: int, depth: int) -> None:
    rng = random.Random(seed)
    engine = make(
        depth,
        max_num_batched_tokens=rng.randint(4, 40),
        num_blocks=rng.randint(16, 40),
        max_num_seqs=rng.randint(1, 4),
        block_size=rng.choice([1, 3, 4]) if seed % 5 == 0 else 4,
        enable_prefix_caching=seed % 4 > 0,
    )
    room = engine.pool.num_blocks * engine.pool.block_size
    beginnings = [[rng.randrange(997) for _ in range(30)] for _ in range(2)]
    wanted: dict[int, list[int]] = {}
    generated: dict[int, list[int]] = {}
    aborted: set[int] = set()

    def arrive() -> None:
        request_id = len(wanted)
        prompt = rng.choice(beginnings)[: rng.randint(0, 30)]
        prompt = (prompt + [rng.randrange(997) for _ in range(rng.randint(1, 12))])[: room // 2]
        count = rng.randint(1, min(20, room // 2))
        stop = continuation(prompt, count)[rng.randrange(count)] if rng.random() < 0.4 else None
        wanted[request_id] = continuation(prompt, count, stop)
        params = SamplingParams(max_tokens=count)
        stop_ids = frozenset() if stop is None else frozenset({stop})
        engine.add(request_id, prompt, params, stop_ids, salt=rng.choice(["", "", "other"]))

    while len(wanted) < 25 or engine.has_work:
        while len(wanted) < 25 and rng.random() < 0.4:
            arrive()
        if wanted and rng.random() < 0.05:
            request_id = rng.randrange(len(wanted))
            if len(generated.get(request_id, [])) < len(wanted[request_id]):
                aborted.add(request_id)
            engine.abort(request_id)
            check(engine)
        before = {request_id: list(generated.get(request_id, [])) for request_id in aborted}
        step(engine, generated)
        assert before == {request_id: generated.get(request_id, []) for request_id in aborted}
    assert engine.pool_is_whole()
    for request_id, tokens in wanted.items():
        if request_id in aborted:
            tokens = tokens[: len(generated.get(request_id, []))]
        assert generated.get(request_id, []) == tokens


def test_the_mixes_contain_what_they_are_meant_to() -> None:
    # Depth 2, a full pool and common beginnings: preempted sequences find their own blocks again.
    engine = make(2, num_blocks=24, max_num_batched_tokens=64)
    prompts = [[5] * 14 + [i] for i in range(4)]
    for i, prompt in enumerate(prompts):
        add(engine, i, prompt, 20)
    assert run(engine) == {i: continuation(prompt, 20) for i, prompt in enumerate(prompts)}
    assert engine.scheduler.num_preemptions > 0
    assert 0 < engine.scheduler.prefix_cache_hits < engine.scheduler.prefix_cache_queries


@pytest.mark.parametrize("depth", [1, 2])
def test_the_last_arrived_is_preempted(depth: int) -> None:
    engine = make(depth, num_blocks=8, max_num_batched_tokens=64)
    for request_id in range(2):
        add(engine, request_id, [request_id] * 14, 8)
    finished = [o.request_id for o in engine.stream() if o.finish_reason]
    assert engine.scheduler.num_preemptions == 1
    assert finished == [0, 1]


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    engine = make(max_num_batched_tokens=8)
    add(engine, 0, [1, 2], 10)
    engine.step()
    add(engine, 1, [3] * 20, 2)
    for _ in range(3):
        engine.step()
    counts = [[span.count for span in step.spans] for step in engine.worker.steps]
    assert counts == [[2], [1, 7], [1, 7], [1, 6]]


def test_a_step_is_submitted_before_the_last_one_is_known() -> None:
    engine = make(2)
    add(engine, 0, [1, 2], 3)
    (output,) = engine.step()
    first, second = engine.worker.steps
    assert first.token_ids == [1, 2]
    assert second.token_ids == [-1]
    assert [sample.position for _, sample in first.samples + second.samples] == [2, 3]
    rest = list(engine.stream())
    assert [output.token_id, *(o.token_id for o in rest)] == continuation([1, 2], 3)
    # The last token is not computed, and its number is known in advance.
    assert [len(step.token_ids) for step in engine.worker.steps] == [2, 1, 1]


def test_a_stop_is_noticed_a_step_late() -> None:
    engine = make(2)
    expected = continuation([1, 2], 5)
    engine.add(0, [1, 2], SamplingParams(max_tokens=9), frozenset({expected[1]}))
    outputs = engine.step() + engine.step()
    assert [(o.token_id, o.finish_reason) for o in outputs] == [
        (expected[0], None),
        (expected[1], "stop"),
    ]
    assert len(engine.worker.steps) == 3
    # One more token is on its way, for nobody; its row and blocks are free already.
    assert engine.num_running == 0
    assert engine.pool.num_free == engine.pool.num_blocks
    assert engine.has_work
    assert not engine.pool_is_whole()
    add(engine, 1, [3, 4], 3)
    assert run(engine) == {1: continuation([3, 4], 3)}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("steps", range(6))
def test_abort_at_any_time(depth: int, steps: int) -> None:
    engine = make(depth, max_num_seqs=2, max_num_batched_tokens=8)
    for request_id in range(3):
        add(engine, request_id, [request_id] * 11, 6)
    generated: dict[int, list[int]] = {}
    for _ in range(steps):
        step(engine, generated)
    engine.abort(0)
    engine.abort(2)
    engine.abort(77)
    check(engine)
    assert engine.num_waiting + engine.num_running == 1
    known = {i: list(generated.get(i, [])) for i in (0, 2)}
    while engine.has_work:
        step(engine, generated)
    assert engine.pool_is_whole()
    assert generated[1] == continuation([1] * 11, 6)
    assert known == {i: generated.get(i, []) for i in (0, 2)}
    # Its id is free again.
    add(engine, 0, [9], 2)
    assert run(engine) == {0: continuation([9], 2)}


def test_an_admitted_sequence_has_a_new_table() -> None:
    engine = make(2, num_blocks=8, max_num_batched_tokens=64)
    for request_id in range(2):
        add(engine, request_id, [request_id] * 14, 8)
    tables: dict[int, list[list[int]]] = {0: [], 1: []}
    while engine.has_work:
        for sequence in engine.scheduler.running.values():
            seen = tables[sequence.request_id]
            if not seen or seen[-1] is not sequence.blocks:
                seen.append(sequence.blocks)
        engine.step()
    assert len(tables[0]) == 1
    assert len(tables[1]) == 2
    # Steps in flight may still look at what a sequence had.
    assert all(table for seen in tables.values() for table in seen)


@pytest.mark.parametrize("depth", [1, 2])
def test_found_prefixes_are_not_computed(depth: int) -> None:
    engine = make(depth, max_num_batched_tokens=64)
    prompt = [7, 8, 9] * 6
    add(engine, 0, prompt, 7)
    assert run(engine) == {0: continuation(prompt, 7)}
    computed = engine.worker.num_computed
    assert computed == 18 + 6

    # 24 tokens were computed: 6 blocks. A prompt of 25 that continues them has one more token.
    longer = prompt + continuation(prompt, 7)
    add(engine, 1, longer, 1)
    assert run(engine) == {1: continuation(longer, 1)}
    assert engine.worker.num_computed - computed == 1
    assert engine.scheduler.prefix_cache_hits == 24
    assert engine.scheduler.prefix_cache_queries == 18 + 25

    # At least one token is computed, so of a prompt of full blocks the last one is.
    computed = engine.worker.num_computed
    add(engine, 2, longer[:24], 1)
    assert run(engine) == {2: continuation(longer[:24], 1)}
    assert engine.worker.num_computed - computed == 4


def test_running_sequences_share_blocks() -> None:
    engine = make(max_num_batched_tokens=64, num_blocks=12)
    prompt = list(range(24))
    add(engine, 0, prompt, 10)
    engine.step()
    free = engine.pool.num_free
    add(engine, 1, [*prompt, 99], 4)
    add(engine, 2, [*prompt, 98], 4)
    engine.step()
    assert engine.num_running == 3
    assert free - engine.pool.num_free == 3
    assert run(engine)[1] == continuation([*prompt, 99], 4)[1:]


def test_different_salts_share_nothing() -> None:
    engine = make(max_num_batched_tokens=64)
    for i, salt in enumerate(["", "a", "b", "a"]):
        engine.add(i, [3] * 17, SamplingParams(max_tokens=1), salt=salt)
        run(engine)
        assert engine.scheduler.prefix_cache_hits == (16 if i == 3 else 0)


def test_without_prefix_caching_everything_is_computed() -> None:
    engine = make(max_num_batched_tokens=64, enable_prefix_caching=False)
    for i in range(2):
        add(engine, i, [3] * 17, 1)
        run(engine)
    assert engine.worker.num_computed == 34
    assert engine.scheduler.prefix_cache_queries == 0


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
    engine = make(num_blocks=12)
    with pytest.raises(UsageError, match=message):
        engine.add(0, [1] * prompt_tokens, SamplingParams(max_tokens=max_tokens))
    assert not engine.has_work


@pytest.mark.parametrize("depth", [1, 2])
def test_a_sequence_may_fill_all_blocks(depth: int) -> None:
    engine = make(depth, num_blocks=12)
    add(engine, 0, [5] * 30, 19)
    assert run(engine) == {0: continuation([5] * 30, 19)}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_sequence_may_fill_max_model_len(depth: int) -> None:
    engine = make(depth)
    engine.add(0, [5] * 60, SamplingParams())
    assert run(engine) == {0: continuation([5] * 60, 4)}


def test_options_that_cannot_work() -> None:
    with pytest.raises(UsageError, match="max_num_batched_tokens = 2 is less than"):
        make(max_num_batched_tokens=2)
    with pytest.raises(UsageError, match="0 blocks"):
        make(num_blocks=0)
    with pytest.raises(UsageError, match="top_p = 0"):
        SamplingParams(top_p=0)
