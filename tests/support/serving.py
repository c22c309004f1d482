"""A server in this process, whose engine and pool a test can look at, and raw connections to it."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.runtime.options import EngineOptions
from tightfit.runtime.ranks.lockstep import Lockstep
from tightfit.runtime.ranks.world import World
from tightfit.runtime.session import Session, start
from tightfit.serve.address import bind
from tightfit.serve.app import Api, Limits
from tightfit.serve.requests import Requests
from tightfit.serve.server import http_server

NAME = "small"
MAX_MODEL_LEN = 512


def session_of(model: Path, *, world: World | None = None, **changes: Any) -> Session:
    """A rank that is ready to generate, with few blocks, so that sequences contend for them."""
    checkpoint = open_checkpoint(str(model))
    values: dict[str, Any] = {
        "dtype": "F32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "num_blocks": 64,
    }
    options = EngineOptions(**(values | changes))
    spec = model_spec(checkpoint.config)
    return start(checkpoint, spec, options, world=world or World(), needs_text=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A server that runs."""

    port: int
    session: Session
    app: Any

    @property
    def url(self) -> str:
        """What clients are given."""
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self) -> socket.socket:
        """A raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def send(self, *parts: bytes, then: str = "read") -> bytes:
        """Send bytes as they are; `then` read the answer, or `close` at once."""
        with self.connect() as client:
            for part in parts:
                client.sendall(part)
            return b"" if then == "close" else read_all(client)

    def wait_until_idle(self, seconds: float = 30.0) -> dict[str, Any]:
        """Wait for the engine to forget everything; fails if it does not, or if a block is lost."""
        deadline = time.monotonic() + seconds
        while True:
            status: dict[str, Any] = self.app.state.requests.status()
            if not any(status[one] for one in ("reading", "waiting", "running", "open")):
                break
            assert time.monotonic() < deadline, status
            time.sleep(0.02)
        while not self.session.engine.pool_is_whole():
            assert time.monotonic() < deadline, "blocks were lost"
            time.sleep(0.02)
        assert status["free_blocks"] == status["total_blocks"]
        return status


@contextmanager
def serving(
    session: Session, *, limit: int = 256, limits: Limits | None = None, connections: int = 512
) -> Iterator[Live]:
    """Serve a session; at the end nothing may be left of any request."""
    engine = session.engine
    requests = Requests(Lockstep(engine, session.world), limit=limit)
    assert session.text is not None
    api = Api(requests, session.text, model=NAME, vocab_size=259, max_model_len=MAX_MODEL_LEN)
    app = api.app(limits or Limits())
    server = http_server(app, max_connections=connections)
    bound = bind("127.0.0.1", 0)
    bound.listen(512)
    port = bound.getsockname()[1]
    threads = [
        threading.Thread(target=server.run, kwargs={"sockets": [bound]}),
        threading.Thread(target=requests.run),
    ]
    for thread in threads:
        thread.start()
    live = Live(port=port, session=session, app=app)
    try:
        yield live
        live.wait_until_idle()
    finally:
        server.should_exit = True
        threads[0].join(20)
        requests.stop()
        threads[1].join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert engine.pool_is_whole()


def read_all(client: socket.socket) -> bytes:
    """Everything until the other side closes."""
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def post(path: str, body: bytes | dict[str, Any], *headers: str, host: str = "localhost") -> bytes:
    """A request as it goes over the wire; the server closes the connection after it."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    if not any(one.lower().startswith("content-type") for one in headers):
        lines.append("Content-Type: application/json")
    if not any(one.lower().startswith(("content-length", "transfer-enc")) for one in headers):
        lines.append(f"Content-Length: {len(content)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


def status_of(answer: bytes) -> int:
    """The status code of a raw answer."""
    return int(answer.split(b" ", 2)[1])


def document_of(answer: bytes) -> dict[str, Any]:
    """The JSON of a raw answer."""
    document: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return document
