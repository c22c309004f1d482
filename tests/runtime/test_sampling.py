import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tightfit.planner.engines import builtin_memory
from tightfit.runtime import sampling
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.ranks.launch import launch_ranks
from tightfit.runtime.ranks.world import World
from tightfit.runtime.sampling import (
    Bounds,
    Sampler,
    SampleRow,
    Vocabulary,
    last_kept,
    on_device,
    ranked,
    token_of,
    uniforms,
)

CPU = torch.device("cpu")
LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))


def row(position: int = 0, **params: float) -> SampleRow:
    return SampleRow(
        params=SamplingParams(**params),  # type: ignore[arg-type]
        position=position,
    )


def sample(logits: torch.Tensor, rows: list[SampleRow], **vocabulary: float) -> list[int]:
    size = logits.shape[1]
    sampler = Sampler(Vocabulary(size=size, widths=[size], **vocabulary), World())
    return sampler(logits, on_device(rows, CPU)).tolist()


def bounds(logits: torch.Tensor, rows: list[SampleRow]) -> Bounds:
    vocabulary = Vocabulary(size=logits.shape[1], widths=[logits.shape[1]])
    return last_kept(logits, on_device(rows, CPU), vocabulary)


def test_numbers_that_float32_does_not_have() -> None:
    rows = on_device([row(temperature=1e300, top_p=1e-300)], CPU)
    assert 1e29 < float(rows.temperature) < math.inf
    assert 0 < float(rows.top_p) < 1e-29
    assert sample(LOGITS, [row(temperature=1.0, top_p=1e-300)]) == [0]
    assert 0 <= sample(LOGITS, [row(temperature=1e300)])[0] < 4


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    def last(**params: float) -> int:
        return int(bounds(LOGITS, [row(temperature=1.0, **params)]).tokens)

    assert last() == 3
    assert last(top_k=2) == 1
    assert last(top_k=99) == 3
    assert last(top_p=0.5) == 0
    assert last(top_p=0.51) == 1
    assert last(top_p=0.89) == 2
    assert last(top_p=1e-9) == 0
    # top-p looks at what top-k has left: 0.5 and 0.25 are two thirds and one third.
    assert last(top_k=2, top_p=0.6) == 0


def test_the_temperature_counts_for_top_p() -> None:
    # Squared: 25, 6.25, 2.25 and 1 of 34.5.
    assert bounds(LOGITS, [row(temperature=0.5, top_p=0.85)]).tokens.tolist() == [1]
    assert bounds(LOGITS, [row(temperature=1.0, top_p=0.85)]).tokens.tolist() == [2]


def test_of_equal_logits_the_lower_tokens_stay() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]])
    found = bounds(logits, [row(temperature=1.0, top_k=3)])
    assert (found.logits.tolist(), found.tokens.tolist()) == ([1.0], [2])
    rows = [row(position=i, temperature=1.0, top_k=3) for i in range(200)]
    assert set(sample(logits.repeat(200, 1), rows)) == {0, 1, 2}


def test_rows_keep_their_own_filters() -> None:
    kinds = [{"top_k": 1}, {}, {"top_p": 0.6}]
    rows = [row(position=i, temperature=1.0, **kinds[i % 3]) for i in range(600)]
    tokens = sample(LOGITS.repeat(600, 1), rows)
    assert [set(tokens[i::3]) for i in range(3)] == [{0}, {0, 1, 2, 3}, {0, 1}]


def test_greedy_takes_the_likeliest_and_the_lower_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [9.0, 3.0, 3.0, 1.0], [-1.0, -0.0, 0.0, -2.0]])
    assert sample(logits, [row(), row(), row()]) == [1, 0, 1]


def test_greedy_rows_have_no_use_for_filters() -> None:
    assert not len(on_device([row(top_k=2, top_p=0.1)], CPU).filtered)


def test_a_token_depends_on_seed_and_position_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 50, generator=generator)
    rows = [row(seed=i % 8, position=i // 8, temperature=1.0, top_k=30) for i in range(40)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [rows[i]])[0] for i in range(40)]
    order = torch.randperm(40, generator=generator).tolist()
    assert sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_seeds_and_positions_differ() -> None:
    flat = torch.zeros(3, 10_000)
    rows = [
        row(temperature=1.0),
        row(temperature=1.0, seed=1),
        row(temperature=1.0, position=1),
    ]
    assert len(set(sample(flat, rows))) == 3


def test_scores_are_scaled_and_capped() -> None:
    logits = torch.tensor([[40.0, 20.0, 10.0]])
    sampler = Sampler(Vocabulary(size=2, widths=[3], scale=0.5, softcap=5.0), World())
    expected = 5 * torch.tensor([[20.0, 10.0]]).div(5).tanh()
    torch.testing.assert_close(sampler.whole(logits), expected)
    rows = [row(position=i, temperature=1.0) for i in range(1000)]
    tokens = sampler(logits.repeat(1000, 1), on_device(rows, CPU))
    share = expected.softmax(dim=-1)[0, 1]
    assert tokens.float().mean() == pytest.approx(float(share), abs=0.05)


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 64 tokens: 150 is beyond the 99.99999th percentile of 63 degrees."""
    count = 100_000
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(1, 64, generator=generator) * 2
    for seed, temperature in ((0, 1.0), (1, 0.7), (2, 1.5)):
        rows = [row(position=i, temperature=temperature, seed=seed) for i in range(count)]
        tokens = torch.tensor(sample(logits.expand(count, -1), rows))
        expected = (logits[0] / temperature).softmax(dim=-1) * count
        common = expected > 10
        found = torch.bincount(tokens, minlength=64)[common]
        expected = expected[common]
        assert float(((found - expected) ** 2 / expected).sum()) < 150


def test_draws_of_a_flat_distribution_are_spread_over_all_tokens() -> None:
    count, size = 2000, 50_000
    tokens = torch.tensor(
        [
            token
            for i in range(0, count, 100)
            for token in sample(
                torch.zeros(100, size), [row(position=i + j, temperature=1.0) for j in range(100)]
            )
        ]
    )
    found = torch.bincount(tokens * 20 // size, minlength=20)
    # 60 is beyond the 99.999th percentile of 19 degrees of freedom.
    assert float(((found - 100) ** 2 / 100.0).sum()) < 60
    # As many different tokens as independent draws have, give or take 5 standard deviations.
    assert len(set(tokens.tolist())) == pytest.approx(size * -math.expm1(-count / size), abs=32)


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_uniform_numbers_are_a_hash_of_key_position_and_token() -> None:
    keys = [(1, 2**32 - 2), (2**31 - 1, 2**31), (123_456_789, 0)]
    positions, ids = [0, 77, 2**31 - 1], [0, 1, 151_935]
    signed = [[k - 2**32 if k >= 2**31 else k for k in key] for key in keys]
    expected = []
    for key, position in zip(keys, positions, strict=True):
        first = mix(position ^ key[0])
        second = mix(first ^ key[1])
        bits = torch.tensor([mix(mix(i ^ first) ^ second) >> 1 for i in ids])
        expected.append((bits.float() + 0.5) / 2**31)
    found = uniforms(*(torch.tensor(x, dtype=torch.int32) for x in (signed, positions, ids)))
    assert torch.equal(found, torch.stack(expected))


def test_ranked_integers_sort_like_scores_and_then_against_tokens() -> None:
    infinity = float("inf")
    scores = torch.tensor([-infinity, -3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 2.0, infinity])
    tokens = torch.arange(len(scores))
    order = ranked(scores, tokens)
    assert order.sort().indices.tolist() == [0, 1, 2, 3, 5, 4, 6, 7, 8]
    assert torch.equal(token_of(order), tokens)
    assert token_of(ranked(scores[:1], torch.tensor([2**31 - 1]))).tolist() == [2**31 - 1]


def test_pieces_of_the_vocabulary_budget_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 30, generator=torch.Generator().manual_seed(1))
    rows = [row(seed=i, temperature=float(i % 2), top_p=0.9) for i in range(9)]
    whole = sample(logits, rows)
    assert builtin_memory.SAMPLER_ELEMENTS == sampling.SAMPLER_ELEMENTS
    monkeypatch.setattr(sampling, "SAMPLER_ELEMENTS", 60)
    assert sample(logits, rows) == whole


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert sample(LOGITS, [row(temperature=1e-38)]) == [int(LOGITS.argmax())]


ON_RANKS = """
import json, sys
import torch
from tightfit.runtime.ranks.world import World
from tightfit.runtime.ranks.launch import launch_ranks
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.sampling import Sampler, SampleRow, Vocabulary, on_device

world = World.from_environment()
size, widths = 1000, json.loads(sys.argv[1])
logits = torch.randn(24, size, generator=torch.Generator().manual_seed(5)) * 3
logits[:, 400] = logits[:, 900] = 12.0
padded = torch.nn.functional.pad(logits, (0, sum(widths) - size), value=99.0)
mine = padded.split(widths, dim=1)[world.rank]
kinds = [(0.0, 0, 1.0), (1.0, 0, 1.0), (2.0, 20, 1.0), (3.0, 0, 0.9)]
params = [SamplingParams(temperature=t, top_k=k, top_p=p) for t, k, p in kinds]
rows = [SampleRow(params[i % 4], 100 + i) for i in range(24)]
sampler = Sampler(Vocabulary(size=size, widths=widths, scale=0.5, softcap=20.0), world)
tokens = sampler(mine, on_device(rows, torch.device("cpu")))
whole = torch.equal(sampler.whole(mine), sampler.vocabulary.scores_(logits.clone()))
everywhere = world.all_gather(tokens)
if world.rank == 0:
    same = all(torch.equal(tokens, other) for other in everywhere)
    result = [tokens.tolist(), whole, same]
    open(sys.argv[2], "w").write(json.dumps(result))
world.close()
"""


def test_ranks_that_share_a_vocabulary_choose_what_one_chooses(tmp_path: Path) -> None:
    found = []
    # Three ranks with padding, of which the last has nothing else.
    for widths in ([1000], [512, 512], [600, 400, 8]):
        out = tmp_path / f"{len(widths)}.json"
        command = [sys.executable, "-c", ON_RANKS, json.dumps(widths), str(out)]
        assert launch_ranks(command, len(widths), environment={"OMP_NUM_THREADS": "1"}) == 0
        found.append(json.loads(out.read_text()))
    tokens = found[0][0]
    assert tokens[::4] == [400] * 6
    assert len(set(tokens)) > 8
    for other, whole, same in found:
        assert other == tokens
        assert whole
        assert same
