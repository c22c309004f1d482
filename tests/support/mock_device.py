"""A device for the engine without a model: the next token is a function of all tokens before.

It sees of a sequence only what a model would see: what steps wrote to the slots of its blocks, and
the last token of a row. Results are known when they are asked for, in order.
"""

from collections import deque
from collections.abc import Sequence

from tightfit.runtime.batch import UNKNOWN, Step
from tightfit.runtime.options import EngineOptions


def next_token(tokens: Sequence[int]) -> int:
    return (sum((i + 1) * token for i, token in enumerate(tokens)) * 31 + len(tokens)) % 997


def continuation(prompt: Sequence[int], count: int, stop: int | None = None) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and stop not in tokens[len(prompt) :]:
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Pending:
    def __init__(self, device: "MockDevice", tokens: list[int]) -> None:
        self._device = device
        self._tokens = tokens

    def tokens(self) -> list[int]:
        assert self._device.in_flight.popleft() is self, "collected out of order"
        return self._tokens


class MockDevice:
    def __init__(self, options: EngineOptions, depth: int = 1) -> None:
        self.options = options
        self.depth = depth
        self.cache: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.in_flight: deque[Pending] = deque()
        self.steps: list[Step] = []

    @property
    def num_computed(self) -> int:
        return sum(len(step.token_ids) for step in self.steps)

    def submit(self, step: Step) -> Pending:
        self.steps.append(step)
        self._check(step)
        token_ids = iter(step.token_ids)
        contents = [self._execute(span, token_ids) for span in step.spans]
        sampled = []
        for i, sample in step.samples:
            assert sample.position == len(contents[i])
            sampled.append(next_token(contents[i]))
        # A step reads the record of the steps before, never its own.
        for (i, _), token in zip(step.samples, sampled, strict=True):
            self.last[step.spans[i].row] = token
        self.in_flight.append(Pending(self, sampled))
        assert len(self.in_flight) <= self.depth
        return self.in_flight[-1]

    def _check(self, step: Step) -> None:
        options, spans = self.options, step.spans
        assert spans
        assert 0 < len(step.token_ids) <= options.max_num_batched_tokens
        assert sum(span.count for span in spans) == len(step.token_ids)
        rows = {span.row for span in spans}
        assert len(rows) == len(spans)
        assert rows <= set(range(options.max_num_seqs))
        assert all(span.count > 0 and span.stop < options.max_model_len for span in spans)
        singles = [span.count == 1 for span in spans]
        assert singles == sorted(singles, reverse=True)
        written = [slot for span in spans for slot in self._slots(span)[span.start :]]
        assert len(written) == len(set(written))

    def _slots(self, span) -> list[int]:
        size = self.options.block_size
        return [span.blocks[p // size] * size + p % size for p in range(span.stop)]

    def _execute(self, span, token_ids) -> list[int]:
        slots = self._slots(span)
        for slot in slots[span.start :]:
            token = next(token_ids)
            self.cache[slot] = self.last[span.row] if token == UNKNOWN else token
        return [self.cache[slot] for slot in slots]
