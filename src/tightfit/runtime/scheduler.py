"""Which tokens run in the next step: continuous batching with chunked prefill. Pure Python.

There is no prefill phase and no decode phase (the idea of vLLM's V1 scheduler): every sequence has
tokens, and a number of them that are computed. A step hands out a budget of tokens: first to the
running sequences, in order of arrival, then to waiting ones. A sequence that catches up with its
tokens samples the next one. When the blocks run out, the last arrived sequence gives up its blocks
and starts again later; what it has generated stays.

All ranks run this on the same requests and see the same sampled tokens, so all schedules agree and
no rank tells another what to do.
"""

from collections import deque
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

from tightfit.errors import UsageError
from tightfit.runtime.blocks import BlockPool
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.units import cdiv


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request and how far it has come; `tokens` are the prompt and what was generated."""

    request_id: int
    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    blocks: list[int] = field(default_factory=list)

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.num_prompt_tokens :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens `start : start + count` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the end of the sequence, so that a token follows."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One new token of a request."""

    request_id: int
    token_id: int
    finish_reason: str | None
    """`stop`, `length`, or None while the request goes on."""


class Scheduler:
    """Waiting and running sequences, and the pool that their blocks come from."""

    def __init__(self, options: EngineOptions, pool: BlockPool) -> None:
        self.options = options
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(
        self,
        request_id: int,
        prompt_ids: ListOf[int],
        params: SamplingParams,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Queue a request.

        Raises:
            UsageError: the prompt is empty, or prompt and answer exceed max_model_len or the cache.
        """
        room = self.options.max_model_len - len(prompt_ids)
        max_tokens = params.max_tokens or room
        if not prompt_ids:
            raise UsageError("a prompt without tokens cannot be continued", hint="give some text")
        if room < 1 or max_tokens > room:
            raise UsageError(
                f"a prompt of {len(prompt_ids)} tokens and max_tokens = {params.max_tokens} "
                f"do not fit in max_model_len = {self.options.max_model_len}",
                hint="raise --max-model-len, or lower --max-tokens, or shorten the prompt",
            )
        # The last token is sampled but never computed, so it needs no place in the cache.
        needed = cdiv(len(prompt_ids) + max_tokens - 1, self.pool.block_size)
        if needed > self.pool.num_blocks:
            raise UsageError(
                f"a prompt of {len(prompt_ids)} tokens and {max_tokens} new ones need {needed} "
                f"blocks of KV cache, and there are {self.pool.num_blocks}",
                hint="give the KV cache more memory, or lower --max-tokens",
            )
        self.waiting.append(
            Sequence(
                request_id=request_id,
                tokens=list(prompt_ids),
                num_prompt_tokens=len(prompt_ids),
                params=params,
                max_tokens=max_tokens,
                stop_ids=frozenset() if params.ignore_eos else stop_ids,
            )
        )

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next step, and give their sequences the blocks they need.

        Single tokens come first, those of the shortest sequences before others, as attention
        wants them.
        """
        budget = self.options.max_num_batched_tokens
        chunks: list[Chunk] = []
        preempted = False
        for sequence in list(self.running):
            if sequence not in self.running:
                continue
            count = min(len(sequence.tokens) - sequence.num_computed, budget)
            while count and not self.pool.grow(sequence.blocks, sequence.num_computed + count):
                preempted = True
                if self._preempt_last() is sequence:
                    count = 0
            if count:
                chunks.append(Chunk(sequence=sequence, start=sequence.num_computed, count=count))
                budget -= count
        while not preempted and self.waiting and budget:
            if len(self.running) == self.options.max_num_seqs:
                break
            sequence = self.waiting[0]
            count = min(len(sequence.tokens), budget)
            if not self.pool.grow(sequence.blocks, count):
                break
            self.running.append(self.waiting.popleft())
            chunks.append(Chunk(sequence=sequence, start=0, count=count))
            budget -= count
        assert chunks or not self.has_work, "a step without work"
        return sorted(chunks, key=lambda chunk: (chunk.count > 1, chunk.start))

    def update(self, chunks: ListOf[Chunk], sampled: ListOf[int]) -> list[Output]:
        """Record a step that was executed; `sampled` has a token for each chunk that samples."""
        tokens = iter(sampled)
        outputs: list[Output] = []
        for chunk in chunks:
            sequence = chunk.sequence
            samples = chunk.samples
            sequence.num_computed += chunk.count
            if not samples:
                continue
            token = next(tokens)
            sequence.tokens.append(token)
            reason: str | None = None
            if token in sequence.stop_ids:
                reason = "stop"
            elif len(sequence.tokens) - sequence.num_prompt_tokens == sequence.max_tokens:
                reason = "length"
            if reason:
                self.running.remove(sequence)
                self.pool.release(sequence.blocks)
            outputs.append(
                Output(request_id=sequence.request_id, token_id=token, finish_reason=reason)
            )
        return outputs

    def _preempt_last(self) -> Sequence:
        """Send the last arrived running sequence back to the head of the queue."""
        sequence = self.running.pop()
        self.pool.release(sequence.blocks)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
        return sequence
