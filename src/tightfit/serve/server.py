"""The HTTP server in a thread beside the engine, and its end."""

import asyncio
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from tightfit.serve.connection import Connection
from tightfit.serve.requests import Requests

_MAX_HEADER_BYTES = 64 * 1024
_BACKLOG = 1024
_CLOSE_SECONDS = 5
"""For answers to reach their clients once the engine has stopped."""


def http_server(app: ASGIApp, *, max_connections: int) -> uvicorn.Server:
    """A server that runs in a thread of its own: `server.run(sockets=[...])`.

    Args:
        app: the application.
        max_connections: more are told 503.
    """
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            limit_concurrency=max_connections,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        )
    )


def serve(
    server: uvicorn.Server,
    requests: Requests,
    bound: socket.socket,
    *,
    drain_seconds: int,
    on_ready: Callable[[], None],
    on_end: Callable[[], None],
) -> int | None:
    """Serve until SIGINT or SIGTERM, then let requests finish for a while.

    Called from the main thread, in which the engine runs. A second signal ends it at once.

    Args:
        server: of the application.
        requests: what the application gives to the engine.
        bound: where to listen; closed at the end.
        drain_seconds: how long unfinished requests may go on after a signal.
        on_ready: called once connections are accepted.
        on_end: called at the first signal.

    Returns:
        The signal that ended it.
    """
    server.config.timeout_graceful_shutdown = drain_seconds + _CLOSE_SECONDS
    received: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        server.should_exit = True
        if received:
            requests.stop()
        else:
            drained = threading.Timer(drain_seconds, requests.stop)
            drained.daemon = True
            drained.start()
            on_end()
        received.append(number)

    def listen() -> None:
        try:
            server.run(sockets=[bound])
        finally:
            requests.stop()

    # The command line switches collection off, for lives much shorter than a server's.
    gc.collect()
    gc.freeze()
    gc.enable()
    bound.listen(_BACKLOG)
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=listen, name="http", daemon=True)
    thread.start()
    try:
        on_ready()
        requests.run()
    finally:
        server.should_exit = True
        thread.join(_CLOSE_SECONDS)
        for number, handler in before.items():
            signal.signal(number, handler)
    return received[0] if received else None


def _is_news(record: logging.LogRecord) -> bool:
    """uvicorn takes it for an error that it cancels what does not end in time."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
