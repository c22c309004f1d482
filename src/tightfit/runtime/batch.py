"""The tokens of one step as tensors: an explicit argument everywhere, never a global context."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens `start : start + count` of a sequence whose cache is in `blocks`."""

    start: int
    count: int
    blocks: Sequence[int]

    @property
    def stop(self) -> int:
        """The length of the sequence after this step."""
        return self.start + self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tokens of many sequences, end to end. Spans of one token come first, the shortest first.

    `token_ids`, `positions` and `slots` are int64 [tokens]; a slot is a place in the KV cache,
    block * block_size + offset. `sample_rows` are the rows whose next token is wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    sample_rows: Tensor
    spans: tuple[Span, ...]


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
    )
