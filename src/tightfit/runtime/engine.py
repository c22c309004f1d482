"""The step loop: schedule, execute, record. Every rank runs it on the same requests."""

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as ListOf

from tightfit.runtime.batch import UNKNOWN, Span, Step
from tightfit.runtime.blocks import BlockPool
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.sampling import SampleRow
from tightfit.runtime.scheduler import Chunk, Output, Scheduler, Sequence
from tightfit.runtime.worker import Sampled, Worker


class Engine:
    """Continuous batching over one rank's worker.

    Up to `worker.depth` steps are in flight, so that a device has its next step before this side
    knows the result of the last. Ranks agree as long as all of them add and abort the same requests
    between the same steps. One thread at a time may use it.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        options = worker.options
        self.pool = BlockPool(options.num_blocks, options.block_size)
        self.scheduler = Scheduler(options, self.pool)
        self._in_flight: deque[tuple[list[Sequence], Sampled]] = deque()

    def add(
        self,
        request_id: int,
        prompt_ids: ListOf[int],
        params: SamplingParams,
        stop_ids: frozenset[int] = frozenset(),
        salt: str = "",
    ) -> None:
        """Queue a request, at any time; requests of one salt share the cache of equal prefixes.

        Raises:
            UsageError: it can never be finished within max_model_len or the KV cache.
        """
        self.scheduler.add(request_id, prompt_ids, params, stop_ids, salt)

    def abort(self, request_id: int) -> None:
        """Forget a request, if it is unfinished; nothing more is heard of it."""
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: unfinished requests, or results to collect."""
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def num_waiting(self) -> int:
        """Requests that have no place in the KV cache."""
        return len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a place in the KV cache."""
        return len(self.scheduler.running)

    def pool_is_whole(self) -> bool:
        """Whether nothing is left of any request but blocks that new ones may find or take."""
        return not self.has_work and self.scheduler.is_idle

    def stream(self) -> Iterator[Output]:
        """Run until all requests are finished, and give every token as soon as it is sampled."""
        while self.has_work:
            yield from self.step()

    def step(self) -> list[Output]:
        """Submit steps until the device has enough to do, and collect the oldest."""
        while len(self._in_flight) < self.worker.depth:
            chunks = self.scheduler.schedule()
            if not chunks:
                break
            sampling = [chunk.sequence for chunk in chunks if chunk.samples]
            self._in_flight.append((sampling, self.worker.submit(_step(chunks))))
        if not self._in_flight:
            assert not self.scheduler.has_work, "requests that nothing is done for"
            return []
        sampling, sampled = self._in_flight.popleft()
        return self.scheduler.update(sampling, sampled.tokens())


def _step(chunks: ListOf[Chunk]) -> Step:
    spans: list[Span] = []
    token_ids: list[int] = []
    samples: list[tuple[int, SampleRow]] = []
    for i, chunk in enumerate(chunks):
        sequence, start, count = chunk.sequence, chunk.start, chunk.count
        end = start + count
        spans.append(Span(start, count, sequence.blocks, sequence.row))
        if count > 1:
            token_ids += sequence.tokens[start:end]
        else:
            # All tokens before one that is sampled are computed, so such a one is alone.
            token_ids.append(sequence.tokens[start] if start < len(sequence.tokens) else UNKNOWN)
        if chunk.samples:
            samples.append((i, SampleRow(sequence.params, end)))
    return Step(spans=tuple(spans), token_ids=token_ids, samples=tuple(samples))
