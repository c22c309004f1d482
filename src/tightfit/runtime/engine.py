"""The step loop: schedule, execute, record. Every rank runs it on the same requests."""

from collections.abc import Iterator, Sequence

from tightfit.runtime.batch import Batch, Span, make_batch
from tightfit.runtime.blocks import BlockPool
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.sampling import SampleRow
from tightfit.runtime.scheduler import Chunk, Output, Scheduler
from tightfit.runtime.worker import Worker


class Engine:
    """Continuous batching over one rank's worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        options = worker.options
        self.pool = BlockPool(options.num_blocks, options.block_size)
        self.scheduler = Scheduler(options, self.pool)

    def add(
        self,
        request_id: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Queue a request.

        Raises:
            UsageError: it can never be finished within max_model_len or the KV cache.
        """
        self.scheduler.add(request_id, prompt_ids, params, stop_ids)

    def stream(self) -> Iterator[Output]:
        """Run until all requests are finished, and give every token as soon as it is sampled."""
        while self.scheduler.has_work:
            yield from self.step()

    def step(self) -> list[Output]:
        """One forward pass."""
        chunks = self.scheduler.schedule()
        sampling = [chunk for chunk in chunks if chunk.samples]
        rows = [
            SampleRow(
                params=chunk.sequence.params,
                request_id=chunk.sequence.request_id,
                position=len(chunk.sequence.tokens),
            )
            for chunk in sampling
        ]
        tokens = self.worker.execute(self._batch(chunks), rows)
        return self.scheduler.update(chunks, tokens)

    def _batch(self, chunks: Sequence[Chunk]) -> Batch:
        spans = [
            Span(start=chunk.start, count=chunk.count, blocks=chunk.sequence.blocks)
            for chunk in chunks
        ]
        token_ids: list[int] = []
        sample_rows: list[int] = []
        for chunk in chunks:
            token_ids += chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
            if chunk.samples:
                sample_rows.append(len(token_ids) - 1)
        return make_batch(
            spans,
            token_ids,
            sample_rows,
            block_size=self.pool.block_size,
            device=self.worker.world.device,
        )
