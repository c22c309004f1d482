"""Steps on their way to a device: `Step` -> `Batch`.

On a GPU nothing may wait. What the host knows is put together in pinned memory and copied while
earlier steps still run; the tensors are views of buffers that never move, so that CUDA graphs can
read them; and tokens that were sampled a step before, which the host does not know yet, are taken
from a record on the device.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tightfit.planner.engines.builtin_cuda import STAGED_STEPS
from tightfit.runtime.batch import UNKNOWN, Batch, Paging, Span, Step, make_batch
from tightfit.runtime.options import EngineOptions
from tightfit.units import cdiv


class Staging(Protocol):
    """Makes batches of steps."""

    def place(self, step: Step, size: int | None = None) -> Batch:
        """The tensors of a step; a CUDA graph has room for `size` sequences of one token."""
        ...

    def resolved(self, batch: Batch) -> Tensor:
        """The token ids of a batch, those that only the device knows filled in."""
        ...

    def keep(self, step: Step, tokens: Tensor) -> None:
        """Remember the tokens that were sampled, int64 [samples], for the steps that follow."""
        ...


class HostStaging:
    """`Staging` for a CPU, which has run one step before it hears of the next."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def place(self, step: Step, size: int | None = None) -> Batch:
        """New tensors."""
        assert size is None, "a CPU has no CUDA graphs"
        return make_batch(
            step.spans,
            step.token_ids,
            _last_tokens(step),
            block_size=self._block_size,
            device=torch.device("cpu"),
        )

    def resolved(self, batch: Batch) -> Tensor:
        """As they came: the host knows all."""
        return batch.token_ids

    def keep(self, step: Step, tokens: Tensor) -> None:
        """The host knows them."""


class CudaStaging:
    """`Staging` for a GPU.

    Steps must run on one stream, in order, and at most `STAGED_STEPS` may be under way.
    """

    def __init__(self, options: EngineOptions, device: torch.device) -> None:
        tokens, seqs = options.max_num_batched_tokens, options.max_num_seqs
        blocks = cdiv(options.max_model_len, options.block_size)
        self._block_size = options.block_size
        self._nowhere = seqs
        self._max_model_len = options.max_model_len
        self._device = device
        self._wide = torch.zeros(3 * tokens + 2 * seqs, dtype=torch.int64, device=device)
        self._narrow = torch.zeros(2 * seqs + 1, dtype=torch.int32, device=device)
        self._table = torch.zeros(seqs, blocks, dtype=torch.int32, device=device)
        self._last = torch.zeros(seqs + 1, dtype=torch.int64, device=device)
        self._hosts = [_Pinned(tokens, seqs, blocks) for _ in range(STAGED_STEPS)]
        self._next = 0
        # What the device's block tables should be, by row, and of which list a row is how much.
        self._blocks = np.zeros((seqs + 1, blocks), dtype=np.int32)
        self._followed: list[tuple[Sequence[int] | None, int]] = [(None, 0)] * seqs

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.nbytes for t in (self._wide, self._narrow, self._table, self._last))

    def place(self, step: Step, size: int | None = None) -> Batch:
        """Views of the buffers, to be filled by copies that the host does not wait for."""
        spans = step.spans
        host = self._hosts[self._next]
        self._next = (self._next + 1) % len(self._hosts)
        columns = self._follow(spans)
        counts = np.fromiter((span.count for span in spans), np.int64, len(spans))
        starts = np.fromiter((span.start for span in spans), np.int64, len(spans))
        rows = np.fromiter((span.row for span in spans), np.int64, len(spans))
        ends = np.cumsum(counts)
        num_tokens = int(ends[-1])
        num_decodes = int((counts == 1).sum())
        if num_tokens == len(spans):
            token_rows, positions = rows, starts
        else:
            token_rows = np.repeat(rows, counts)
            positions = np.arange(num_tokens) + np.repeat(starts - (ends - counts), counts)
        block, offset = np.divmod(positions, self._block_size)
        ids = np.fromiter(step.token_ids, np.int64, num_tokens)
        places = size or num_tokens
        sequences = size or len(spans)

        wide, n = host.wide.numpy(), num_tokens
        wide[: 3 * places + sequences] = 0
        wide[:n] = np.where(ids == UNKNOWN, -1 - token_rows, ids)
        wide[places : places + n] = positions
        slots = wide[2 * places : 3 * places]
        slots[n:] = -1
        slots[:n] = self._blocks[token_rows, block] * np.int64(self._block_size) + offset
        at = 3 * places
        wide[at : at + len(spans)] = rows
        wide[at + len(spans) : at + sequences] = self._nowhere
        at += sequences
        sampled = [i for i, _ in step.samples]
        wide[at : at + len(sampled)] = ends[sampled] - 1
        at += len(sampled)

        narrow = host.narrow.numpy()
        narrow[0] = 0
        narrow[1 : len(spans) + 1] = ends
        narrow[len(spans) + 1 : sequences + 1] = np.arange(n + 1, n + 1 + sequences - len(spans))
        lengths = narrow[sequences + 1 : 2 * sequences + 1]
        lengths[: len(spans)] = starts + counts
        lengths[len(spans) :] = 0
        table = host.table[: len(spans) * columns].view(len(spans), columns)
        np.take(self._blocks[:, :columns], rows, axis=0, out=table.numpy())

        self._wide[:at].copy_(host.wide[:at], non_blocking=True)
        self._narrow[: 2 * sequences + 1].copy_(host.narrow[: 2 * sequences + 1], non_blocking=True)
        self._table[: len(spans), :columns].copy_(table, non_blocking=True)
        batch = self._views(places, sequences, len(sampled))
        decodes = size or num_decodes
        longest = self._max_model_len if size else int((starts + counts).max())
        return self._batch(batch, spans, decodes, longest, sequences)

    def empty(self, size: int) -> Batch:
        """A batch without sequences, for the capture of a graph with places for `size`."""
        self._wide.zero_()
        self._wide[2 * size : 3 * size] = -1
        self._wide[3 * size : 4 * size] = self._nowhere
        self._narrow.zero_()
        torch.arange(size + 1, out=self._narrow[: size + 1])
        return self._batch(self._views(size, size, size), (), size, self._max_model_len, size)

    def resolved(self, batch: Batch) -> Tensor:
        """The token ids of a batch, those that only the device knows filled in."""
        raw = batch.token_ids
        return torch.where(raw < 0, self._last[(-1 - raw).clamp_(min=0)], raw)

    def keep(self, step: Step, tokens: Tensor) -> None:
        """Record them by the rows of their sequences."""
        rows = [step.spans[i].row for i, _ in step.samples]
        host = self._hosts[(self._next - 1) % len(self._hosts)]
        index = host.sampled[: len(rows)]
        index.numpy()[:] = rows
        self._last.index_copy_(0, index.to(self._device, non_blocking=True), tokens)

    def _follow(self, spans: Sequence[Span]) -> int:
        """Bring the host's tables up to date; how many columns of them the step needs."""
        widest = 0
        for span in spans:
            blocks, row = span.blocks, span.row
            followed, known = self._followed[row]
            count = len(blocks)
            if followed is not blocks:
                known = 0
            if known != count:
                self._blocks[row, known:count] = blocks[known:]
                self._followed[row] = blocks, count
            widest = max(widest, count)
        return widest

    def _views(self, places: int, sequences: int, samples: int) -> tuple[Tensor, ...]:
        sizes = [places, places, places, sequences, samples]
        ends = list(accumulate(sizes))
        return tuple(self._wide[end - size : end] for size, end in zip(sizes, ends, strict=True))

    def _batch(
        self,
        views: tuple[Tensor, ...],
        spans: tuple[Span, ...],
        num_decodes: int,
        max_length: int,
        sequences: int,
    ) -> Batch:
        token_ids, positions, slots, rows, sample_rows = views
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            sample_rows=sample_rows,
            spans=spans,
            num_decodes=num_decodes,
            rows=rows,
            paging=Paging(
                query_starts=self._narrow[: sequences + 1],
                lengths=self._narrow[sequences + 1 : 2 * sequences + 1],
                block_table=self._table[:sequences],
                max_length=max_length,
            ),
        )


class _Pinned:
    """Where the host writes one step."""

    def __init__(self, tokens: int, seqs: int, blocks: int) -> None:
        pinned = torch.cuda.is_available()
        self.wide = torch.zeros(3 * tokens + 2 * seqs, dtype=torch.int64, pin_memory=pinned)
        self.narrow = torch.zeros(2 * seqs + 1, dtype=torch.int32, pin_memory=pinned)
        self.table = torch.zeros(seqs * blocks, dtype=torch.int32, pin_memory=pinned)
        self.sampled = torch.zeros(seqs, dtype=torch.int64, pin_memory=pinned)


def _last_tokens(step: Step) -> list[int]:
    ends = list(accumulate(span.count for span in step.spans))
    return [ends[i] - 1 for i, _ in step.samples]
