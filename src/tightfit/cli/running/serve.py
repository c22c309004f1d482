"""`tightfit run --serve`: the planned model behind an OpenAI-compatible endpoint."""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tightfit.cli.output import note
from tightfit.cli.running.job import Job, in_world, launch_other_ranks, require_packages
from tightfit.errors import ExitCode, UsageError
from tightfit.units import parse_bytes

if TYPE_CHECKING:
    import socket

    from tightfit.runtime.ranks.world import World

KEY_VARIABLE = "TIGHTFIT_API_KEY"
_OTHER_CONNECTIONS = 256
"""Beside those of requests that are served: idle ones, and ones that will be told 429."""

_ENDING_SECONDS = 15
"""For ranks to end, after the requests that were let finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How the endpoint is to be; the defaults are those of the command line."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None
    max_concurrent_requests: int = 256
    max_body_bytes: str = "4MiB"
    drain_seconds: int = 30

    @property
    def key(self) -> str | None:
        """What clients must send, if anything."""
        return self.api_key or os.environ.get(KEY_VARIABLE) or None


def read_serving(given: Mapping[str, Any]) -> Serving:
    """The options of `--serve`, before anything is loaded.

    Raises:
        MissingExtraError: a package is missing.
        UsageError: an address that others can reach, without a key; or a size that is none.
    """
    require_packages("run --serve", "serve", ("starlette", "uvicorn"))
    from tightfit.serve.address import is_loopback

    serving = Serving(**given)
    if not is_loopback(serving.host) and serving.key is None:
        raise UsageError(
            f"--host {serving.host} can be reached by others, and there is no API key",
            hint=f"set {KEY_VARIABLE}, or stay at 127.0.0.1 and use a tunnel",
        )
    if parse_bytes(serving.max_body_bytes) < 1:
        raise UsageError(f"--max-body-bytes {serving.max_body_bytes} is too small", hint="1MiB")
    if (key := serving.key) and not (key.isascii() and key.isprintable()):
        raise UsageError("the API key has characters that no header can carry", hint="use ASCII")
    return serving


def serve(job: Job, serving: Serving) -> ExitCode:
    """Serve until a signal; every rank calls it, and rank 0 talks to clients.

    Returns:
        0 after SIGTERM, 130 after Ctrl-C.
    """
    from tightfit.runtime.ranks.launch import is_rank
    from tightfit.serve.address import bind

    if not is_rank():
        # What cannot be listened at shall not cost the time to load.
        bound = bind(serving.host, serving.port)
        if len(job.plan.ranks) > 1:
            bound.close()
        else:
            return in_world(job, lambda world: _serve(job, serving, world, bound))
    launch_other_ranks(job, grace_seconds=serving.drain_seconds + _ENDING_SECONDS)
    return in_world(job, lambda world: _serve(job, serving, world, None))


def _serve(job: Job, serving: Serving, world: "World", bound: "socket.socket | None") -> ExitCode:
    from tightfit.runtime.ranks.lockstep import Lockstep
    from tightfit.runtime.session import start

    session = start(
        job.checkpoint,
        job.spec,
        job.options,
        world=world,
        needs_text=True,
        **job.source(world.rank),
    )
    lockstep = Lockstep(session.engine, world)
    if world.rank > 0:
        # Rank 0 lets the others go once its clients are through.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        lockstep.follow()
        return ExitCode.OK
    from tightfit.serve import server
    from tightfit.serve.address import bind
    from tightfit.serve.app import Api, Limits
    from tightfit.serve.requests import Requests

    assert session.text is not None
    name = serving.served_model_name or job.plan.model.name
    requests = Requests(lockstep, limit=serving.max_concurrent_requests)
    api = Api(
        requests,
        session.text,
        model=name,
        vocab_size=job.spec.vocab_size,
        max_model_len=job.options.max_model_len,
    )
    limits = Limits(
        api_key=serving.key,
        only_local_names=serving.key is None,
        max_body_bytes=parse_bytes(serving.max_body_bytes),
    )
    bound = bound or bind(serving.host, serving.port)
    host, port = bound.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    listener = server.http_server(
        api.app(limits),
        max_connections=serving.max_concurrent_requests + _OTHER_CONNECTIONS,
    )
    ended_by = server.serve(
        listener,
        requests,
        bound,
        drain_seconds=serving.drain_seconds,
        on_ready=lambda: note(f"serving {name} at http://{where}:{port}/v1"),
        on_end=lambda: note(
            f"ending: requests under way may go on for {serving.drain_seconds} s; a second signal "
            "ends them at once"
        ),
    )
    return ExitCode.INTERRUPTED if ended_by == signal.SIGINT else ExitCode.OK
