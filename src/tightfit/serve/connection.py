"""Connections that do not wait for ever: uvicorn has no time limits for headers and for readers."""

import asyncio
import socket
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
"""From the first byte of a request, or the connection, to the end of its headers."""
STALLED_SECONDS = 30.0
"""How long a client may take nothing of what is sent to it."""


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, which cuts clients that are silent or do not read."""

    _header_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        # What is left to be sent after the last answer is the kernel's business.
        if option := getattr(socket, "TCP_USER_TIMEOUT", None):
            with suppress(OSError):
                transport.get_extra_info("socket").setsockopt(
                    socket.IPPROTO_TCP, option, int(STALLED_SECONDS * 1000)
                )
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Begin or end the wait for headers."""
        super().data_received(data)
        self._expect_headers()

    def on_response_complete(self) -> None:
        """A request that has come meanwhile begins at once; else uvicorn's own timer waits."""
        super().on_response_complete()
        self._stop_header_timer()

    def _expect_headers(self) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._stop_header_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        self._stop_stall_timer()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for any more."""
        super().connection_lost(exc)
        self._stop_header_timer()
        self._stop_stall_timer()
