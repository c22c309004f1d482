import torch

from tightfit.planner.engines import builtin_memory
from tightfit.runtime import sampling
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.sampling import SampleRow, filter_logits, sample

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))


def row(request_id: int = 0, position: int = 0, **params: float) -> SampleRow:
    return SampleRow(
        params=SamplingParams(**params),  # type: ignore[arg-type]
        request_id=request_id,
        position=position,
    )


def kept(**params: float) -> list[int]:
    filtered = filter_logits(LOGITS.clone(), [row(temperature=1.0, **params)])
    return torch.isfinite(filtered)[0].nonzero().flatten().tolist()


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=99) == [0, 1, 2, 3]
    assert kept(top_p=0.5) == [0]
    assert kept(top_p=0.51) == [0, 1]
    assert kept(top_p=0.89) == [0, 1, 2]
    assert kept(top_p=1e-9) == [0]
    # top-p looks at what top-k has left: 0.5 and 0.25 are two thirds and one third.
    assert kept(top_k=2, top_p=0.6) == [0]


def test_rows_keep_their_own_filters() -> None:
    rows = [
        row(temperature=1.0, top_k=1),
        row(temperature=1.0),
        row(temperature=1.0, top_p=0.6),
    ]
    filtered = filter_logits(LOGITS.repeat(3, 1), rows)
    assert torch.isfinite(filtered).sum(dim=1).tolist() == [1, 4, 2]


def test_temperature_divides_the_logits() -> None:
    filtered = filter_logits(LOGITS.clone(), [row(temperature=0.5)])
    torch.testing.assert_close(filtered, LOGITS * 2)


def test_greedy_takes_the_likeliest_and_the_lower_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [9.0, 3.0, 3.0, 1.0]])
    assert sample(logits, [row(), row()]).tolist() == [1, 0]


def test_a_token_depends_on_seed_request_and_position_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 50, generator=generator)
    rows = [row(request_id=i % 8, position=i // 8, temperature=1.0, top_k=30) for i in range(40)]
    together = sample(logits.clone(), rows).tolist()
    alone = [int(sample(logits[i : i + 1].clone(), [rows[i]])) for i in range(40)]
    assert together == alone
    order = torch.randperm(40, generator=generator).tolist()
    shuffled = sample(logits[order].clone(), [rows[i] for i in order]).tolist()
    assert shuffled == [together[i] for i in order]


def test_seeds_requests_and_positions_differ() -> None:
    flat = torch.zeros(1, 10_000)
    tokens = {
        int(sample(flat.clone(), [r]))
        for r in (
            row(temperature=1.0),
            row(temperature=1.0, seed=1),
            row(temperature=1.0, request_id=1),
            row(temperature=1.0, position=1),
        )
    }
    assert len(tokens) == 4


def test_draws_follow_the_probabilities() -> None:
    count = 4000
    rows = [row(position=i, temperature=1.0) for i in range(count)]
    tokens = sample(LOGITS.repeat(count, 1), rows)
    shares = torch.bincount(tokens, minlength=4) / count
    torch.testing.assert_close(shares, LOGITS.exp()[0], atol=0.03, rtol=0)


def test_pieces_of_the_vocabulary_budget_change_nothing(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    logits = torch.randn(9, 30, generator=torch.Generator().manual_seed(1))
    rows = [row(request_id=i, temperature=float(i % 2), top_p=0.9) for i in range(9)]
    whole = sample(logits.clone(), rows).tolist()
    assert builtin_memory.SAMPLER_ELEMENTS == sampling.SAMPLER_ELEMENTS
    monkeypatch.setattr(sampling, "SAMPLER_ELEMENTS", 60)
    assert sample(logits.clone(), rows).tolist() == whole


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert sample(LOGITS.clone(), [row(temperature=1e-38)]).tolist() == [int(LOGITS.argmax())]
