"""The same requests to the engines of all ranks, between the same steps.

Rank 0 takes requests in; the others follow it. Before each step rank 0 tells what has changed,
which is mostly nothing: an empty message. A single rank sends none at all.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tightfit.errors import TightfitError
from tightfit.runtime.engine import Engine
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.ranks.world import World
from tightfit.runtime.scheduler import Output

HEARTBEAT_SECONDS = 30.0
"""An idle rank 0 takes a turn at least this often, or the others take it for dead."""

Refused = Mapping[int, TightfitError]
"""Requests that can never be served, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """Begin a request."""

    request_id: int
    prompt_ids: Sequence[int]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Forget a request."""

    request_id: int


class Lockstep:
    """This rank's engine among those of the other ranks.

    Raises:
        RankFailedError: (any method) another rank died.
    """

    def __init__(self, engine: Engine, world: World) -> None:
        self.engine = engine
        self.world = world
        self._followers = world.size > 1

    def turn(
        self,
        commands: Sequence[Add | Abort] = (),
        between: Callable[[Refused], None] = lambda _: None,
    ) -> list[Output]:
        """On rank 0: change what all ranks work on, then execute a step if there is work.

        `between` is told what is refused as soon as that is known, for a step may take long.
        """
        between(self._apply(commands))
        return self._step()

    def follow(self) -> None:
        """On other ranks: do as rank 0 does, until that is closed."""
        while (told := self.world.broadcast_bytes(b"")) != _CLOSED:
            for request_id, *request in json.loads(told or b"[]"):
                if not request:
                    self.engine.abort(request_id)
                    continue
                prompt_ids, params, stop_ids = request
                params = SamplingParams(**params)
                self.engine.add(request_id, prompt_ids, params, frozenset(stop_ids))
            self._step()

    def close(self) -> None:
        """On rank 0: let the others go."""
        if self._followers:
            self.world.broadcast_bytes(_CLOSED)

    def _apply(self, commands: Sequence[Add | Abort]) -> Refused:
        refused: dict[int, TightfitError] = {}
        accepted: list[list[Any]] = []
        for command in commands:
            if isinstance(command, Abort):
                self.engine.abort(command.request_id)
                accepted.append([command.request_id])
                continue
            try:
                self.engine.add(
                    command.request_id, command.prompt_ids, command.params, command.stop_ids
                )
            except TightfitError as error:
                refused[command.request_id] = error
                continue
            if self._followers:
                params, stops = asdict(command.params), sorted(command.stop_ids)
                accepted.append([command.request_id, list(command.prompt_ids), params, stops])
        if self._followers:
            self.world.broadcast_bytes(json.dumps(accepted).encode() if accepted else b"")
        return refused

    def _step(self) -> list[Output]:
        return self.engine.step() if self.engine.has_work else []


_CLOSED = b"closed"
