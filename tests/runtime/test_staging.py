"""What reaches the device, on one that is a CPU: the buffers do not know the difference."""

import random

import torch

from tightfit.runtime.batch import UNKNOWN, Span, Step, make_batch
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.sampling import SampleRow
from tightfit.runtime.staging import CudaStaging

OPTIONS = EngineOptions(
    dtype="F32",
    max_model_len=64,
    max_num_seqs=6,
    max_num_batched_tokens=48,
    num_blocks=80,
    block_size=4,
)
GREEDY = SampleRow(params=SamplingParams(), position=0)
CPU = torch.device("cpu")


def random_step(rng: random.Random) -> Step:
    spans = []
    for row in rng.sample(range(6), rng.randint(1, 6)):
        start, count = rng.randint(0, 50), rng.choice([1, 1, rng.randint(1, 8)])
        blocks = rng.sample(range(80), 16)
        spans.append(Span(row=row, start=start, count=count, blocks=blocks))
    spans.sort(key=lambda span: (span.count > 1, span.start))
    return step_of(spans, [rng.randrange(1000) for s in spans for _ in range(s.count)])


def step_of(spans: list[Span], token_ids: list[int]) -> Step:
    samples = tuple((i, GREEDY) for i, _ in enumerate(spans))
    return Step(spans=tuple(spans), token_ids=token_ids, samples=samples)


def test_the_device_gets_what_a_cpu_gets() -> None:
    rng = random.Random(0)
    staging = CudaStaging(OPTIONS, CPU)
    for _ in range(40):
        step = random_step(rng)
        found = staging.place(step)
        ends = [sum(s.count for s in step.spans[: i + 1]) for i in range(len(step.spans))]
        wanted = make_batch(
            step.spans, step.token_ids, [e - 1 for e in ends], block_size=4, device=CPU
        )
        for name in ("token_ids", "positions", "slots", "sample_rows"):
            assert getattr(found, name).tolist() == getattr(wanted, name).tolist(), name
        assert found.num_decodes == wanted.num_decodes
        assert found.rows is not None
        assert found.paging is not None
        assert found.rows.tolist() == [span.row for span in step.spans]
        assert found.paging.query_starts.tolist() == [0, *ends]
        assert found.paging.lengths.tolist() == [span.stop for span in step.spans]
        for table, span in zip(found.paging.block_table.tolist(), step.spans, strict=True):
            assert table[: len(span.blocks)] == span.blocks


def test_spare_places_of_a_graph_are_no_sequences() -> None:
    staging = CudaStaging(OPTIONS, CPU)
    staging.place(random_step(random.Random(1)))
    spans = [
        Span(row=2, start=9, count=1, blocks=[5, 6, 7]),
        Span(row=0, start=3, count=1, blocks=[4]),
    ]
    batch = staging.place(step_of(spans, [11, 12]), 4)
    assert batch.token_ids.tolist()[:2] == [11, 12]
    assert batch.slots.tolist() == [7 * 4 + 1, 4 * 4 + 3, -1, -1]
    assert batch.num_decodes == 4
    assert batch.rows is not None
    assert batch.paging is not None
    assert batch.rows.tolist() == [2, 0, 6, 6]
    assert batch.paging.lengths.tolist() == [10, 4, 0, 0]
    assert batch.paging.query_starts.tolist() == [0, 1, 2, 3, 4]
    captured = CudaStaging(OPTIONS, CPU)
    views = captured.empty(4)
    captured.place(step_of(spans, [11, 12]), 4)
    assert views.slots.tolist() == batch.slots.tolist()
    assert views.token_ids.tolist()[:2] == [11, 12]


def test_tokens_that_only_the_device_knows() -> None:
    staging = CudaStaging(OPTIONS, CPU)
    first, second = (Span(row=r, start=4, count=1, blocks=[r, r + 8]) for r in (3, 1))
    staging.place(step_of([first, second], [7, 8]))
    staging.keep(step_of([first, second], [7, 8]), torch.tensor([101, 102]))
    batch = staging.place(step_of([second, first], [UNKNOWN, 9]))
    assert staging.resolved(batch).tolist() == [102, 9]
    batch = staging.place(step_of([first, second], [UNKNOWN, UNKNOWN]), 4)
    assert staging.resolved(batch).tolist()[:2] == [101, 102]


def test_block_tables_follow_their_sequences() -> None:
    staging = CudaStaging(OPTIONS, CPU)
    blocks = [1]
    for length in range(1, 20):
        if length % 4 == 1 and length > 1:
            blocks.append(length)
        batch = staging.place(step_of([Span(row=0, start=length - 1, count=1, blocks=blocks)], [5]))
        assert batch.paging is not None
        assert batch.paging.block_table[0, : len(blocks)].tolist() == blocks
    again = [70, 71, 72, 73, 74]
    batch = staging.place(step_of([Span(row=0, start=0, count=18, blocks=again)], [5] * 18))
    assert batch.paging is not None
    assert batch.paging.block_table[0, :5].tolist() == again
