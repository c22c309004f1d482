"""Requests between the event loop, which talks to clients, and the engine's thread.

The engine runs in the main thread, where it was loaded; the event loop in another. A request goes
over by a queue; what a step has brought comes back in one call. A request keeps its place until the
engine has forgotten it, not merely until its client is gone.

What a client has not read yet waits as token ids, `max_tokens` at most; a connection that takes
nothing for a while is cut (`connection`).
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

from tightfit.runtime.options import SamplingParams
from tightfit.runtime.ranks.lockstep import HEARTBEAT_SECONDS, Abort, Add, Lockstep, Refused
from tightfit.runtime.scheduler import Output
from tightfit.serve.errors import ApiError


class Stream:
    """The tokens of one request as they come; belongs to the event loop."""

    def __init__(self, requests: "Requests", request_id: int) -> None:
        self._requests = requests
        self._request_id = request_id
        self._tokens: list[int] = []
        self._news = asyncio.Event()
        self._accepted = False
        self._error: ApiError | None = None
        self.finish_reason: str | None = None

    async def accepted(self) -> None:
        """Wait until the engine has taken the request.

        Raises:
            ApiError: 400 if it cannot be served, 503 if the engine has stopped.
        """
        while not (self._accepted or self._error):
            await self._wait()
        if self._error:
            raise self._error

    async def batches(self) -> AsyncIterator[list[int]]:
        """New tokens, as many as there are, until `finish_reason` is set.

        Raises:
            ApiError: 503 if the engine has stopped.
        """
        while True:
            if self._error:
                raise self._error
            tokens, self._tokens = self._tokens, []
            if tokens:
                yield tokens
            elif self.finish_reason:
                return
            else:
                await self._wait()

    def close(self) -> None:
        """Nobody listens any more: let the engine forget the request if it is unfinished."""
        self._requests.abort(self._request_id)

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _told(self, *, token: Output | None = None, error: ApiError | None = None) -> None:
        self._accepted = self._accepted or error is None
        self._error = self._error or error
        if token is not None:
            self._tokens.append(token.token_id)
            self.finish_reason = token.finish_reason
        self._news.set()


class Place:
    """A place among the requests that may be served at once."""

    def __init__(self, requests: "Requests") -> None:
        self._requests = requests
        self.taken = False

    def open(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, stop_ids: frozenset[int]
    ) -> Stream:
        """Give the request to the engine."""
        assert not self.taken
        self.taken = True
        return self._requests.open(prompt_ids, sampling, stop_ids)


@dataclass(slots=True)
class _News:
    """What a turn has brought."""

    accepted: list[int] = field(default_factory=list)
    refused: Refused = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.accepted or self.refused or self.outputs or self.forgotten)


class Requests:
    """All requests that are being read, waiting or running: `limit` at most."""

    def __init__(self, lockstep: Lockstep, *, limit: int) -> None:
        self._lockstep = lockstep
        self._limit = limit
        self._inbox: SimpleQueue[Add | Abort | None] = SimpleQueue()
        self._ids = count()
        self._places = 0
        self._live: dict[int, Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: str | None = None

    # What follows is called from the event loop.

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place for a request that has just begun to arrive.

        Raises:
            ApiError: 429 if there is none, 503 if the engine has stopped.
        """
        if self._failure:
            raise ApiError(503, self._failure)
        if self._places + len(self._live) >= self._limit:
            raise ApiError(
                429,
                f"{self._limit} requests are being served: try again later",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
        self._loop = asyncio.get_running_loop()
        place = Place(self)
        self._places += 1
        try:
            yield place
        finally:
            if not place.taken:
                self._places -= 1

    def open(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, stop_ids: frozenset[int]
    ) -> Stream:
        """Give a request that has a place to the engine.

        Raises:
            ApiError: 503 if the engine has stopped while the request was read.
        """
        if self._failure:
            raise ApiError(503, self._failure)
        request_id = next(self._ids)
        stream = self._live[request_id] = Stream(self, request_id)
        self._places -= 1
        self._inbox.put(
            Add(request_id=request_id, prompt_ids=prompt_ids, params=sampling, stop_ids=stop_ids)
        )
        return stream

    def abort(self, request_id: int) -> None:
        """Let the engine forget a request, if it has not finished."""
        if request_id in self._live:
            self._inbox.put(Abort(request_id=request_id))

    def status(self) -> dict[str, Any]:
        """What `/health` says."""
        engine = self._lockstep.engine
        return {
            "status": self._failure or "ok",
            "reading": self._places,
            "waiting": engine.num_waiting,
            "running": engine.num_running,
            "open": len(self._live),
            "free_blocks": engine.pool.num_free,
            "total_blocks": engine.pool.num_blocks,
        }

    def _on_news(self, news: _News) -> None:
        for request_id in news.accepted:
            if stream := self._live.get(request_id):
                stream._told()
        for request_id, error in news.refused.items():
            # Hints speak of options, which are not the client's.
            self._end(request_id, ApiError(400, error.message, code="context_length_exceeded"))
        for output in news.outputs:
            if stream := self._live.get(output.request_id):
                stream._told(token=output)
                if output.finish_reason:
                    del self._live[output.request_id]
        for request_id in news.forgotten:
            self._end(request_id, ApiError(503, "the request was aborted"))

    def _end(self, request_id: int, error: ApiError) -> None:
        if stream := self._live.pop(request_id, None):
            stream._told(error=error)

    def _on_failure(self) -> None:
        for request_id in list(self._live):
            self._end(request_id, ApiError(503, self._failure or "the engine has stopped"))

    # What follows is called from the engine's thread, or from any.

    def stop(self) -> None:
        """Let `run` return; from any thread."""
        self._inbox.put(None)

    def run(self) -> None:
        """Serve until `stop`, then forget what is unfinished.

        Raises:
            Exception: what the engine raised; all clients have been told.
        """
        lockstep, engine = self._lockstep, self._lockstep.engine
        unfinished: set[int] = set()
        try:
            while (commands := self._take(wait=not engine.has_work)) is not None:
                outputs = lockstep.turn(commands, partial(self._taken, commands, unfinished))
                unfinished -= {one.request_id for one in outputs if one.finish_reason}
                if outputs:
                    self._tell(_News(outputs=outputs))
            lockstep.turn([Abort(request_id=one) for one in unfinished])
            while engine.has_work:
                lockstep.turn()
            self._fail("the server is stopping")
            lockstep.close()
        except BaseException as error:
            self._fail(f"the engine has failed: {type(error).__name__}")
            raise

    def _taken(
        self, commands: Sequence[Add | Abort], unfinished: set[int], refused: Refused
    ) -> None:
        """Note and tell what has begun and ended, since clients wait for the status code."""
        news = _News(refused=refused)
        for command in commands:
            if isinstance(command, Abort):
                unfinished.discard(command.request_id)
                news.forgotten.append(command.request_id)
            elif command.request_id not in refused:
                unfinished.add(command.request_id)
                news.accepted.append(command.request_id)
        if news:
            self._tell(news)

    def _fail(self, why: str) -> None:
        """Tell everybody who waits, and those who come."""
        self._failure = why
        self._call(self._on_failure)

    def _take(self, *, wait: bool) -> list[Add | Abort] | None:
        """What has arrived; None after `stop`."""
        commands: list[Add | Abort] = []
        try:
            command = self._inbox.get(block=wait, timeout=HEARTBEAT_SECONDS)
            while command is not None:
                commands.append(command)
                command = self._inbox.get_nowait()
        except Empty:
            return commands
        return None

    def _tell(self, news: _News) -> None:
        self._call(self._on_news, news)

    def _call(self, *call: Any) -> None:
        # A loop that is closed has no clients left.
        with suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(*call)
