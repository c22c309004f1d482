"""Which tokens run in the next step: continuous batching with chunked prefill. Pure Python.

There is no prefill phase and no decode phase (the idea of vLLM's V1 scheduler): every sequence has
tokens, and a number of them that are computed. A step hands out a budget of tokens: first to the
running sequences, in order of arrival, then to waiting ones. A sequence that catches up with its
tokens samples the next one. When the blocks run out, the last arrived sequence gives up its blocks
and starts again later; what it has generated stays.

Steps are scheduled ahead of their results: a token counts as soon as the step that samples it is
scheduled, even while nobody but the device knows it. That it ends its sequence is noticed late, and
what was scheduled for the sequence meanwhile is dropped. Its blocks and its row go to others at
once, also those that a step in flight still writes to: the device executes steps in order, so
whatever a later step puts there comes after.

All ranks run this on the same requests and see the same sampled tokens, so all schedules agree and
no rank tells another what to do.
"""

from collections import deque
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from operator import attrgetter

from tightfit.errors import UsageError
from tightfit.runtime.blocks import BlockPool, extend_keys
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.units import cdiv


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request and how far it has come.

    `tokens` are the prompt and what is known of the answer; of the `num_tokens` that it has, the
    last may have been sampled by steps whose results were not collected yet.
    """

    request_id: int
    tokens: list[int]
    num_prompt_tokens: int
    num_tokens: int
    max_num_tokens: int
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    salt: bytes = b""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache once all scheduled steps are through."""
    row: int = -1
    """Its own among the running sequences; -1 while it waits."""
    blocks: list[int] = field(default_factory=list)
    """Never emptied, but replaced by another list, so that a changed table can be told by `is`."""
    keys: list[bytes] = field(default_factory=list)
    """Those of its first full blocks, as far as they were needed."""
    num_published: int = 0
    """Blocks that others can find, from the first on."""
    finished: bool = False


@dataclass(slots=True)
class Chunk:
    """Tokens `start : start + count` of a sequence, to be computed in one step.

    `samples` says that the chunk reaches the end of the sequence, so that a token follows.
    """

    # There are hundreds in a step, and a frozen dataclass takes four times as long to create.
    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(slots=True)
class Output:
    """One new token of a request."""

    request_id: int
    token_id: int
    finish_reason: str | None
    """`stop`, `length`, or None while the request goes on."""


class Scheduler:
    """Waiting and running sequences, and the pool that their blocks come from.

    `prefix_cache_queries` are the tokens that were looked for when sequences began to run, and
    `prefix_cache_hits` those that were found and not computed (vLLM's counters of these names).
    """

    def __init__(self, options: EngineOptions, pool: BlockPool) -> None:
        self.options = options
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        """By row, in order of arrival."""
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._unfinished: dict[int, Sequence] = {}
        self._free_rows = list(reversed(range(options.max_num_seqs)))

    def add(
        self,
        request_id: int,
        prompt_ids: ListOf[int],
        params: SamplingParams,
        stop_ids: frozenset[int] = frozenset(),
        salt: str = "",
    ) -> None:
        """Queue a request; requests share the cache of equal prefixes if they have the same salt.

        Raises:
            UsageError: the prompt is empty, or prompt and answer exceed max_model_len or the cache.
        """
        assert request_id not in self._unfinished, "two requests of the same id"
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
        sequence = Sequence(
            request_id=request_id,
            tokens=list(prompt_ids),
            num_prompt_tokens=len(prompt_ids),
            num_tokens=len(prompt_ids),
            max_num_tokens=len(prompt_ids) + max_tokens,
            params=params,
            stop_ids=frozenset() if params.ignore_eos else stop_ids,
            salt=salt.encode(),
        )
        self._unfinished[request_id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: int) -> None:
        """Forget a request, if it is unfinished; nothing more is heard of it."""
        sequence = self._unfinished.get(request_id)
        if sequence is not None:
            self._finish(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._unfinished)

    @property
    def is_idle(self) -> bool:
        """Whether there is no request, and no block or row is held or lost."""
        rows = len(self._free_rows)
        return not self.has_work and self.pool.is_whole and rows == self.options.max_num_seqs

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next step, and give their sequences the blocks they need.

        Single tokens come first. There is nothing to run as long as all sequences wait for tokens
        that are in flight.
        """
        pool, block_size = self.pool, self.pool.block_size
        budget = self.options.max_num_batched_tokens
        decodes: list[Chunk] = []
        prefills: list[Chunk] = []
        num_preemptions = self.num_preemptions
        for sequence in list(self.running.values()):
            start, end = sequence.num_computed, sequence.num_tokens
            if end == sequence.max_num_tokens or sequence.row < 0 or not budget:
                continue
            if end - start > budget:
                end = start + budget
            if end > len(sequence.blocks) * block_size:
                while sequence.row >= 0 and not pool.grow(sequence.blocks, end):
                    self._preempt_last()
                if sequence.row < 0:
                    continue
            budget -= end - start
            (decodes if end - start == 1 else prefills).append(self._chunk(sequence, end))
        # What was preempted just now would take back what others needed.
        while self.waiting and budget and self.num_preemptions == num_preemptions:
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            end = min(sequence.num_tokens, sequence.num_computed + budget)
            budget -= end - sequence.num_computed
            single = end - sequence.num_computed == 1
            (decodes if single else prefills).append(self._chunk(sequence, end))
        for chunk in prefills:
            self._publish(chunk.sequence)
        decodes.sort(key=attrgetter("start"))
        return decodes + prefills

    def update(self, sampling: ListOf[Sequence], tokens: ListOf[int]) -> list[Output]:
        """Record the tokens of a step, in the order of its chunks that sample."""
        block_size = self.pool.block_size
        outputs: list[Output] = []
        for sequence, token in zip(sampling, tokens, strict=True):
            if sequence.finished:
                continue
            sequence.tokens.append(token)
            length = len(sequence.tokens)
            # The new token is not computed, but all before it are.
            if (length - 1) % block_size == 0:
                self._publish(sequence)
            reason: str | None = None
            if token in sequence.stop_ids:
                reason = "stop"
            elif length == sequence.max_num_tokens:
                reason = "length"
            if reason:
                self._finish(sequence)
            outputs.append(Output(sequence.request_id, token, reason))
        return outputs

    def _chunk(self, sequence: Sequence, end: int) -> Chunk:
        start, samples = sequence.num_computed, end == sequence.num_tokens
        sequence.num_computed = end
        if samples:
            sequence.num_tokens += 1
        return Chunk(sequence, start, end - start, samples)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a row, and blocks for all of its tokens, if there are."""
        known = len(sequence.tokens)
        # A preempted sequence can be computed anew only with tokens that are known.
        if not self._free_rows or known < sequence.num_tokens:
            return False
        found: list[int] = []
        if self.options.enable_prefix_caching:
            # The last token is always computed: what follows it is wanted.
            findable = (known - 1) // self.pool.block_size
            self._extend_keys(sequence, findable)
            found = self.pool.find(sequence.keys[:findable])
        blocks = self.pool.share(found, known)
        if blocks is None:
            return False
        sequence.blocks = blocks
        sequence.num_published = len(found)
        sequence.num_computed = len(found) * self.pool.block_size
        sequence.row = self._free_rows.pop()
        self.running[sequence.row] = sequence
        if self.options.enable_prefix_caching:
            self.prefix_cache_queries += known
            self.prefix_cache_hits += sequence.num_computed
        return True

    def _publish(self, sequence: Sequence) -> None:
        """Let later steps find the full blocks whose tokens are known and computed."""
        if not self.options.enable_prefix_caching:
            return
        full = min(sequence.num_computed, len(sequence.tokens)) // self.pool.block_size
        self._extend_keys(sequence, full)
        for i in range(sequence.num_published, full):
            self.pool.publish(sequence.blocks[i], sequence.keys[i])
        sequence.num_published = max(sequence.num_published, full)

    def _extend_keys(self, sequence: Sequence, num_blocks: int) -> None:
        extend_keys(sequence.keys, sequence.tokens, num_blocks, self.pool.block_size, sequence.salt)

    def _preempt_last(self) -> None:
        """Send the last arrived running sequence back to the head of the queue."""
        sequence = self.running[next(reversed(self.running))]
        self._stop_running(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _finish(self, sequence: Sequence) -> None:
        if sequence.row >= 0:
            self._stop_running(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.finished = True
        del self._unfinished[sequence.request_id]

    def _stop_running(self, sequence: Sequence) -> None:
        del self.running[sequence.row]
        self._free_rows.append(sequence.row)
        self.pool.release(sequence.blocks)
        sequence.row = -1
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.num_published = 0
