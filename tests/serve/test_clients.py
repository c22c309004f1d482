"""Real clients: OpenAI's, many at once, slow ones, and ones that leave."""

import asyncio
import json
import random
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

import tightfit.serve.connection as connection
from support.serving import NAME, Live, document_of, post, read_all, serving, status_of
from tightfit.runtime.session import Session

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def client_of(live: Live, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url, api_key="none", max_retries=0, **options)


def test_chat_whole_and_streamed_say_the_same(live: Live) -> None:
    client = client_of(live)
    asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    usage = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=usage))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1
    live.wait_until_idle()


def test_completions_from_text_and_from_ids(live: Live) -> None:
    client = client_of(live)
    answers = [
        client.completions.create(model=NAME, prompt=prompt, max_tokens=8, temperature=0)
        for prompt in ("Hello", ["Hello"], [live.session.text.encode("Hello")])  # type: ignore
    ]
    assert len({answer.choices[0].text for answer in answers}) == 1
    stream = client.completions.create(
        model=NAME, prompt="Hello", max_tokens=8, temperature=0, stream=True
    )
    assert "".join(one.choices[0].text for one in stream) == answers[0].choices[0].text


def test_stop_texts_end_an_answer_before_them(live: Live) -> None:
    client = client_of(live)
    asked: dict[str, Any] = {"model": NAME, "prompt": "Hello", "max_tokens": 60, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[20:23]
    (choice,) = client.completions.create(**asked, stop=[stop, "never"]).choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(one.choices[0].text for one in streamed) == choice.text
    live.wait_until_idle()


def test_models_and_health(live: Live) -> None:
    (model,) = client_of(live).models.list().data
    assert model.id == NAME
    assert client_of(live).models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client_of(live).models.retrieve("another/one")
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    health = document_of(live.send(get))
    assert health["free_blocks"] == health["total_blocks"] == 64


def test_errors_are_those_of_the_client(live: Live) -> None:
    client = client_of(live)
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=10**6)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="has no tokens"):
        client.completions.create(model=NAME, prompt="")


async def many(live: Live, count: int, **options: Any) -> list[str]:
    """Chats that run at once, some of them streamed."""
    async with openai.AsyncOpenAI(base_url=live.url, api_key="none", max_retries=0) as client:

        async def one(i: int) -> str:
            asked: dict[str, Any] = {
                "model": NAME,
                "messages": [{"role": "user", "content": f"{i} " * (1 + i % 30)}],
                "max_tokens": 8 + i % 17,
                "temperature": 0,
                **options,
            }
            if i % 2:
                answer = await client.chat.completions.create(**asked)
                return answer.choices[0].message.content or ""
            stream = await client.chat.completions.create(**asked, stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        return list(await asyncio.gather(*map(one, range(count))))


def test_64_clients_at_once(live: Live) -> None:
    together = asyncio.run(many(live, 64))
    live.wait_until_idle()
    again = asyncio.run(many(live, 64))
    assert together == again
    assert len(set(together)) > 30


def test_too_many_are_told_to_come_later(session: Session) -> None:
    body = {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True}
    with serving(session, limit=4) as live, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(live.send, [post("/v1/completions", body)] * 12))
        codes = sorted(map(status_of, answers))
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 4
        refused = next(one for one in answers if status_of(one) == 429)
        assert b"\r\nretry-after: 1\r\n" in refused
        assert document_of(refused)["error"]["type"] == "rate_limit_error"


def begin(live: Live, body: dict[str, Any]) -> socket.socket:
    """A streamed answer of which the first bytes are there."""
    client = live.connect()
    client.sendall(post("/v1/completions", {"stream": True, "ignore_eos": True, **body}))
    assert status_of(client.recv(100)) == 200
    return client


@pytest.mark.parametrize("how", ["close", "reset", "half"])
def test_clients_that_leave_in_the_middle(live: Live, how: str) -> None:
    clients = [begin(live, {"prompt": f"Hello {i}", "max_tokens": 480}) for i in range(6)]
    for client in clients:
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how == "half":
            client.shutdown(socket.SHUT_WR)
            continue
        client.close()
    live.wait_until_idle(10)
    for client in clients:
        client.close()


def test_clients_that_leave_while_they_wait(live: Live) -> None:
    body = post("/v1/completions", {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True})
    started = time.monotonic()
    for _ in range(40):
        live.send(body, then="close")
    live.wait_until_idle()
    # Computed to their ends they would be 16,000 tokens.
    assert time.monotonic() - started < 15


def test_clients_that_leave_at_any_moment(live: Live) -> None:
    random.seed(1)
    body = {"prompt": "Hello", "max_tokens": 60, "stream": True}

    def visit(i: int) -> None:
        with live.connect() as client:
            client.sendall(post("/v1/completions", {**body, "stream": i % 3 > 0}))
            client.settimeout(random.random() * 0.4)
            try:
                while client.recv(256):
                    pass
            except TimeoutError:
                pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(visit, range(100)))
    live.wait_until_idle()


def test_clients_that_do_not_read(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALLED_SECONDS", 0.5)
    with serving(session) as live:
        with live.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            # Answers in one connection, one after another, of which nothing is read.
            body = json.dumps({"prompt": "Hello", "max_tokens": 400, "stream": True}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            deadline = time.monotonic() + 60
            try:
                client.settimeout(5)
                while time.monotonic() < deadline:
                    client.sendall(head.encode() + body)
                    time.sleep(0.1)
                pytest.fail("the connection was never cut")
            except (ConnectionError, TimeoutError):
                pass
        # Others are served all the while.
        assert status_of(live.send(post("/v1/completions", {"prompt": "a"}))) == 200


def test_slow_readers_get_everything(live: Live) -> None:
    with begin(live, {"prompt": "Hello", "max_tokens": 200}) as client:
        parts = []
        while part := client.recv(997):
            parts.append(part)
            time.sleep(0.01)
        assert b"".join(parts).count(b"data: [DONE]") == 1


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    one = post("/v1/completions", {"prompt": "a", "max_tokens": 1}).replace(
        b"Connection: close", b"Connection: keep-alive"
    )
    last = post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    with live.connect() as client:
        client.sendall(one * 3 + last)
        assert read_all(client).count(b"HTTP/1.1 200 OK") == 4


def test_a_request_that_was_being_read_when_the_engine_stopped(session: Session) -> None:
    from tightfit.runtime.ranks.lockstep import Lockstep
    from tightfit.serve.errors import ApiError
    from tightfit.serve.requests import Requests

    requests = Requests(Lockstep(session.engine, session.world), limit=4)

    async def ask() -> None:
        with requests.place() as place:
            requests.stop()
            await asyncio.to_thread(requests.run)
            # Nobody would ever answer it.
            with pytest.raises(ApiError, match="the server is stopping"):
                place.open([5, 6], _params(), frozenset())

    asyncio.run(ask())


def test_the_engines_failure_is_told(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from tightfit.runtime.ranks.lockstep import Lockstep
    from tightfit.serve.requests import Requests

    def broken(*_: Any) -> list[Any]:
        raise MemoryError

    requests = Requests(Lockstep(session.engine, session.world), limit=4)
    monkeypatch.setattr(Lockstep, "turn", broken)

    async def ask() -> None:
        with requests.place() as place:
            stream = place.open([5, 6], _params(), frozenset())
        engine = asyncio.to_thread(requests.run)
        with pytest.raises(MemoryError):
            await engine
        with pytest.raises(Exception, match="the engine has failed: MemoryError"):
            async for _tokens in stream.batches():
                pass
        with pytest.raises(Exception, match="the engine has failed"), requests.place():
            pass

    asyncio.run(ask())
    for request_id in list(session.engine.scheduler._unfinished):
        session.engine.abort(request_id)
    assert session.engine.pool_is_whole()


def _params() -> Any:
    from tightfit.runtime.options import SamplingParams

    return SamplingParams(max_tokens=4)
