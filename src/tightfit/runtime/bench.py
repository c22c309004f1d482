"""Throughput and latency of an engine under a load of random requests.

The standard load is nano-vllm's (`bench.py` there): 256 sequences of random tokens, prompts and
answers of 100 to 1024 tokens each, all at once. Times are those of this process: no client and no
network are in them.
"""

import random
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter, sleep
from typing import Any

import numpy as np

from tightfit.errors import UsageError
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.ranks.lockstep import HEARTBEAT_SECONDS, Abort, Add, Lockstep, Refused

_BINS = 40
_WARM_UP_REQUESTS = 8
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests and when they come.

    Lengths are drawn evenly from the ranges, ends included. Without `request_rate` (per second,
    Poisson) all come at once; `concurrency` bounds how many are under way.
    """

    num_prompts: int = 256
    input_len: tuple[int, int] = (100, 1024)
    output_len: tuple[int, int] = (100, 1024)
    request_rate: float | None = None
    concurrency: int | None = None
    seed: int = 0

    def check(self, options: EngineOptions) -> None:
        """Refuse what the engine cannot take.

        Raises:
            UsageError: requests that are longer than max_model_len.
        """
        longest = self.input_len[1] + self.output_len[1]
        if longest > options.max_model_len:
            raise UsageError(
                f"requests of {self.input_len[1]} + {self.output_len[1]} tokens are longer than "
                f"max_model_len = {options.max_model_len}",
                hint=f"--max-model-len {longest}, or smaller --input-len and --output-len",
            )

    def requests(self, vocab_size: int) -> list["Request"]:
        """The same ones for the same seed."""
        chance = random.Random(self.seed)
        arrival = 0.0
        requests = []
        for _ in range(self.num_prompts):
            if self.request_rate is not None:
                arrival += chance.expovariate(self.request_rate)
            length = chance.randint(*self.input_len)
            requests.append(
                Request(
                    arrival_seconds=arrival,
                    prompt_ids=[chance.randrange(vocab_size) for _ in range(length)],
                    output_len=chance.randint(*self.output_len),
                )
            )
        return requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One of a load."""

    arrival_seconds: float
    prompt_ids: Sequence[int]
    output_len: int


@dataclass(slots=True, kw_only=True)
class Measured:
    """What was seen, in seconds since the start.

    `tokens[i]` has the time of every token of request i, and `sent[i]` when it was sent.
    """

    sent: list[float]
    tokens: "list[array[float]]"
    steps: "array[float]" = field(default_factory=lambda: array("d"))
    num_preemptions: int = 0
    input_tokens: int = 0

    @property
    def duration_seconds(self) -> float:
        """Until the last token."""
        return max(times[-1] for times in self.tokens)

    def to_json(self, load: Load) -> dict[str, Any]:
        """The result in schema 1."""
        output_tokens = sum(map(len, self.tokens))
        seconds = self.duration_seconds
        firsts = [times[0] - sent for times, sent in zip(self.tokens, self.sent, strict=True)]
        whole = [times[-1] - sent for times, sent in zip(self.tokens, self.sent, strict=True)]
        between = np.concatenate([np.diff(np.asarray(times)) for times in self.tokens])
        return {
            "load": asdict(load),
            "duration_seconds": seconds,
            "requests": len(self.tokens),
            "input_tokens": self.input_tokens,
            "output_tokens": output_tokens,
            "requests_per_second": len(self.tokens) / seconds,
            "output_tokens_per_second": output_tokens / seconds,
            "total_tokens_per_second": (self.input_tokens + output_tokens) / seconds,
            "time_to_first_token": _spread(firsts),
            "inter_token_latency": _spread(between),
            "request_latency": _spread(whole),
            "step": _spread(self.steps),
            "num_preemptions": self.num_preemptions,
            "timeline": self._timeline(),
        }

    def _timeline(self) -> list[dict[str, float]]:
        """Output tokens per second, in slices of the whole time."""
        times = np.concatenate([np.asarray(times) for times in self.tokens])
        counts, edges = np.histogram(times, bins=_BINS, range=(0.0, self.duration_seconds))
        width = edges[1] - edges[0]
        return [
            {"seconds": float(start), "output_tokens_per_second": float(n / width)}
            for start, n in zip(edges[:-1], counts, strict=True)
        ]


def measure(
    lockstep: Lockstep,
    load: Load,
    vocab_size: int,
    tell: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Warm up, then work through a load; on rank 0, while the others follow.

    `tell` gets the number of requests that are answered.

    Raises:
        UsageError: the engine refuses a request.
    """
    tokens = min(_WARM_UP_TOKENS, load.output_len[1])
    few = [
        Request(arrival_seconds=0.0, prompt_ids=one.prompt_ids, output_len=tokens)
        for one in Load(
            num_prompts=min(_WARM_UP_REQUESTS, load.num_prompts),
            input_len=load.input_len,
            seed=load.seed + 1,
        ).requests(vocab_size)
    ]
    _work(lockstep, few, None)
    return _work(lockstep, load.requests(vocab_size), load.concurrency, tell)


def _work(
    lockstep: Lockstep,
    requests: Sequence[Request],
    concurrency: int | None,
    tell: Callable[[int], None] = lambda done: None,
) -> Measured:
    engine = lockstep.engine
    result = Measured(
        sent=[0.0] * len(requests),
        tokens=[array("d") for _ in requests],
        input_tokens=sum(len(one.prompt_ids) for one in requests),
    )
    waiting, under_way = deque(enumerate(requests)), 0
    preempted = engine.scheduler.num_preemptions
    started = perf_counter()
    while waiting or under_way:
        now = perf_counter() - started
        commands: list[Add | Abort] = []
        while (
            waiting
            and waiting[0][1].arrival_seconds <= now
            and under_way < (concurrency or len(requests))
        ):
            i, request = waiting.popleft()
            # What waits for its turn has not been sent; what comes late has been.
            result.sent[i] = now if concurrency else request.arrival_seconds
            params = SamplingParams(
                temperature=1.0, seed=i, max_tokens=request.output_len, ignore_eos=True
            )
            commands.append(Add(request_id=i, prompt_ids=request.prompt_ids, params=params))
            under_way += 1
        before = perf_counter()
        outputs = lockstep.turn(commands, _raise)
        if not under_way:
            sleep(min(max(0.0, waiting[0][1].arrival_seconds - now), HEARTBEAT_SECONDS))
            continue
        after = perf_counter()
        result.steps.append(after - before)
        for output in outputs:
            result.tokens[output.request_id].append(after - started)
            under_way -= output.finish_reason is not None
        tell(len(requests) - len(waiting) - under_way)
    result.num_preemptions = engine.scheduler.num_preemptions - preempted
    return result


def _raise(refused: Refused) -> None:
    for error in refused.values():
        raise error


def _spread(seconds: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Milliseconds: mean, quantiles, and how many there are of each size up to the 99th."""
    values = np.asarray(seconds) * 1e3
    if not len(values):
        return {"count": 0}
    median, p90, p99, most = (float(one) for one in np.percentile(values, (50, 90, 99, 100)))
    counts, edges = np.histogram(values, bins=_BINS, range=(0.0, max(p99, 1e-6)))
    return {
        "count": len(values),
        "mean_ms": float(values.mean()),
        "median_ms": median,
        "p90_ms": p90,
        "p99_ms": p99,
        "max_ms": most,
        "histogram": {"bin_ms": float(edges[1]), "counts": counts.tolist()},
    }
