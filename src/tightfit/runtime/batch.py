"""The tokens of one step: what the engine asks for, and the tensors that a device gets of it.

They are explicit arguments everywhere, never a global context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.runtime.sampling import SampleRow

UNKNOWN = -1
"""The id of a token that was sampled in a step before, and that only the device knows so far."""


@dataclass(slots=True)
class Span:
    """Tokens `start : start + count` of a sequence whose cache is in `blocks`.

    `row` is the sequence's own, less than max_num_seqs, while it runs: what a device keeps for it
    between steps is there.
    """

    # There are hundreds in a step, and a frozen dataclass takes five times as long to create.
    start: int
    count: int
    blocks: Sequence[int]
    row: int = 0

    @property
    def stop(self) -> int:
        """The length of the sequence after this step."""
        return self.start + self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What runs at once. Spans of one token come first, the shortest first.

    `token_ids` are those of all spans, end to end, or UNKNOWN. `samples` are the spans, by index
    and in order, after which a token is wanted, and how to choose it.
    """

    spans: tuple[Span, ...]
    token_ids: Sequence[int]
    samples: tuple[tuple[int, SampleRow], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paging:
    """Where the sequences of a batch are in the KV cache, for kernels that look for themselves.

    Sequence i has the tokens `query_starts[i] : query_starts[i + 1]` of the batch and, with them,
    `lengths[i]` in all; its blocks are row i of `block_table`. All int32: [sequences + 1],
    [sequences], [sequences, blocks]. A length of 0 is no sequence, but a place that a CUDA graph
    has for one.
    """

    query_starts: Tensor
    lengths: Tensor
    block_table: Tensor
    max_length: int
    """No sequence is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tokens of many sequences, end to end. Spans of one token come first, the shortest first.

    `token_ids`, `positions` and `slots` are int64 [tokens]; a slot is a place in the KV cache,
    block * block_size + offset, or -1 for a token that is not kept. `sample_rows` are the tokens
    whose next token is wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    sample_rows: Tensor
    spans: tuple[Span, ...]
    num_decodes: int
    """Sequences with one token; in a CUDA graph all of them, real or not."""
    rows: Tensor | None = None
    """The row of each sequence, int64 [sequences]; max_num_seqs for no sequence. On GPUs only."""
    paging: Paging | None = None


def make_batch(
    spans: Sequence[Span],
    token_ids: Sequence[int],
    sample_rows: Sequence[int],
    *,
    block_size: int,
    device: torch.device,
) -> Batch:
    """Lay out spans in their order; `token_ids` are those of all spans."""
    positions = [p for span in spans for p in range(span.start, span.stop)]
    slots = [
        span.blocks[p // block_size] * block_size + p % block_size
        for span in spans
        for p in range(span.start, span.stop)
    ]

    def column(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Batch(
        token_ids=column(token_ids),
        positions=column(positions),
        slots=column(slots),
        sample_rows=column(sample_rows),
        spans=tuple(spans),
        num_decodes=sum(span.count == 1 for span in spans),
    )
