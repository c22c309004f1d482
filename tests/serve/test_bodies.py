"""Bodies and headers that are too large, wrong, cut off or slow get a status code."""

import json
import time
from typing import Any

import pytest

import tightfit.serve.connection as connection
from support.serving import (
    MAX_MODEL_LEN,
    Live,
    document_of,
    post,
    read_all,
    serving,
    status_of,
)
from tightfit.runtime.session import Session
from tightfit.serve.app import Limits

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def refused(live: Live, path: str, body: bytes | dict[str, Any], status: int = 400) -> dict:
    answer = live.send(post(path, body))
    assert status_of(answer) == status, answer
    error = document_of(answer)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\xff",
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"prompt": "a"} {"prompt": "b"}',
        '{"prompt": "a"}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:24]),
)
def test_malformed_bodies(live: Live, body: bytes) -> None:
    refused(live, COMPLETIONS, body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", 3),
        ("prompt", {}),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", ["a", "b"]),
        ("prompt", [1, "a"]),
        ("prompt", [1, True]),
        ("prompt", [-1]),
        ("prompt", [259]),
        ("prompt", [2**70]),
        ("prompt", "\ud800"),
        ("model", 5),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", MAX_MODEL_LEN),
        ("max_tokens", 2**31 - 1),
        ("max_tokens", 2**40),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "warm"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.0),
        ("seed", 2**63),
        ("seed", "a"),
        ("n", 2),
        ("best_of", 2),
        ("logprobs", 5),
        ("echo", True),
        ("suffix", "b"),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["a", 5]),
        ("stop", ["a"] * 17),
        ("stop", "a" * 1025),
        ("stop", "\udcff"),
        ("ignore_eos", 1),
    ],
)
def test_wrong_fields_are_named(live: Live, field: str, value: object) -> None:
    error = refused(live, COMPLETIONS, {"prompt": "a", field: value})
    assert error["param"] == field or "max_model_len" in error["message"]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "Hello",
        [5],
        [{}],
        [{"role": 5, "content": "a"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [5]}],
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_wrong_messages(live: Live, messages: object) -> None:
    error = refused(live, CHAT, {"messages": messages})
    assert str(error["param"]).startswith("messages")


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"max_completion_tokens": 0},
        {"max_completion_tokens": 10**6},
    ],
)
def test_what_chat_cannot_do_is_refused(live: Live, more: dict[str, Any]) -> None:
    refused(live, CHAT, {"messages": HELLO, **more})


def test_unknown_fields_and_nulls_mean_nothing(live: Live) -> None:
    body = {"prompt": "a", "max_tokens": 2, "user": "me", "x": {"y": [1]}, "top_p": None}
    body |= {"stop": None, "n": 1, "logprobs": None, "echo": False, "stream_options": None}
    assert status_of(live.send(post(COMPLETIONS, body))) == 200
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    assert status_of(live.send(post(CHAT, body))) == 200


def test_prompts_of_nearly_all_the_context(live: Live) -> None:
    body = {"prompt": [5] * (MAX_MODEL_LEN - 1), "max_tokens": 1}
    assert document_of(live.send(post(COMPLETIONS, body)))["usage"]["prompt_tokens"] == 511
    for length in (MAX_MODEL_LEN, 100_000):
        error = refused(live, COMPLETIONS, {"prompt": [5] * length, "max_tokens": 1})
        assert error["code"] == "context_length_exceeded"
        refused(live, CHAT, {"messages": [{"role": "user", "content": "a " * length}]})


def test_large_bodies_are_not_read(session: Session) -> None:
    with serving(session, limits=Limits(max_body_bytes=1000)) as live:
        exact = json.dumps({"prompt": "a", "max_tokens": 1, "x": ""}).encode()
        exact = exact[:-2] + b"y" * (1000 - len(exact)) + exact[-2:]
        assert status_of(live.send(post(COMPLETIONS, exact))) == 200
        assert status_of(live.send(post(COMPLETIONS, exact + b" "))) == 413
        head = post(COMPLETIONS, b"", "Content-Length: 99999999999")
        assert status_of(live.send(head)) == 413
        chunks = post(COMPLETIONS, b"", "Transfer-Encoding: chunked")
        assert status_of(live.send(chunks, *[b"c8\r\n" + b" " * 200 + b"\r\n"] * 6)) == 413


def test_chunked_bodies(live: Live) -> None:
    head = post(COMPLETIONS, b"", "Transfer-Encoding: chunked")
    body = json.dumps({"prompt": "ab", "max_tokens": 2}).encode()
    chunks = [b"1\r\n" + body[i : i + 1] + b"\r\n" for i in range(len(body))]
    assert status_of(live.send(head, *chunks, b"0\r\n\r\n")) == 200
    assert status_of(live.send(head, b"zz\r\n" + body)) == 400
    assert status_of(live.send(head, chunks[0], b"0\r\n\r\n")) == 400


def test_truncated_bodies(live: Live) -> None:
    whole = post(COMPLETIONS, {"prompt": "a"})
    for length in range(1, len(whole), 7):
        live.send(whole[:length], then="close")


def test_broken_requests(live: Live) -> None:
    for bad in (b"\0\0\0\0\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"):
        assert status_of(live.send(bad)) == 400
    both = post(COMPLETIONS, b"{}", "Content-Length: -5")
    assert status_of(live.send(both)) == 400
    assert status_of(live.send(b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000)) in (400, 431)


def test_methods_paths_and_content_types(live: Live) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    assert status_of(live.send(post("/v1/nothing", body))) == 404
    assert status_of(live.send(post("/v1/models", body))) == 405
    get = b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert status_of(live.send(get)) == 405
    assert document_of(live.send(get))["error"]["type"] == "invalid_request_error"
    form = post(COMPLETIONS, body, "Content-Type: application/x-www-form-urlencoded")
    assert status_of(live.send(form)) == 415
    upper = post(COMPLETIONS, body, "Content-Type: Application/JSON; charset=utf-8")
    assert status_of(live.send(upper)) == 200


def test_another_model_is_not_found(live: Live) -> None:
    error = refused(live, CHAT, {"model": "gpt-5", "messages": HELLO}, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    body = {"model": "small", "messages": HELLO, "max_tokens": 1}
    assert status_of(live.send(post(CHAT, body))) == 200


def test_keys(session: Session) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    limits = Limits(api_key="the-key", only_local_names=False)
    with serving(session, limits=limits) as live:
        for header in (
            "",
            "Bearer",
            "Bearer the-ke",
            "Bearer the-key2",
            "Basic the-key",
            "Bearer é",
        ):
            answer = live.send(post(COMPLETIONS, body, f"Authorization: {header}"))
            assert status_of(answer) == 401, header
            assert b"www-authenticate: Bearer" in answer
        assert status_of(live.send(post(COMPLETIONS, body))) == 401
        good = post(COMPLETIONS, body, "Authorization: Bearer the-key", host="example.org")
        assert status_of(live.send(good)) == 200
        health = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert status_of(live.send(health)) == 200


def test_pages_of_other_hosts_cannot_use_a_browser_here(live: Live) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example"):
        assert status_of(live.send(post(COMPLETIONS, body, host=host))) == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert status_of(live.send(post(COMPLETIONS, body, host=host))) == 200


def test_slow_bodies_end(session: Session) -> None:
    with serving(session, limits=Limits(read_seconds=0.5)) as live, live.connect() as client:
        client.sendall(post(COMPLETIONS, b"{", "Content-Length: 100"))
        assert status_of(read_all(client)) == 408


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n"])
def test_slow_headers_end(session: Session, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    with serving(session) as live, live.connect() as client:
        client.sendall(sent)
        started = time.monotonic()
        assert read_all(client) == b""
        assert time.monotonic() - started < 5
