"""The ASGI application: routes, who may use them, and how much of a request is read."""

import asyncio
import hmac
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tightfit.errors import TightfitError
from tightfit.runtime.text import Text
from tightfit.serve.answers import Answer
from tightfit.serve.errors import ApiError
from tightfit.serve.protocol import Asked, read_body, read_chat, read_completion
from tightfit.serve.requests import Requests

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_CLIENT_CLOSED = 499
"""nginx's status for a client that is gone; nobody reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is taken from clients."""

    api_key: str | None = None
    only_local_names: bool = True
    """Refuse requests for other hosts, which a web page can send through a browser here."""
    max_body_bytes: int = 4 * 2**20
    read_seconds: float = 30.0
    """Time for the whole body to arrive."""


class Api:
    """The endpoints of one model."""

    def __init__(
        self, requests: Requests, text: Text, *, model: str, vocab_size: int, max_model_len: int
    ) -> None:
        self.requests = requests
        self._text = text
        self._model = model
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._created = int(time.time())

    def app(self, limits: Limits) -> Starlette:
        """The application; its `state.requests` has the figures of `/health`."""

        async def completions(request: Request) -> Response:
            return await self._answer(request, read_completion, limits)

        async def chat(request: Request) -> Response:
            return await self._answer(request, read_chat, limits)

        app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._one_model),
                Route("/v1/completions", completions, methods=["POST"]),
                Route("/v1/chat/completions", chat, methods=["POST"]),
            ],
            middleware=[Middleware(_Gate, limits=limits)],
            exception_handlers={ApiError: _api_error, HTTPException: _http_error, 500: _bug},
        )
        app.state.requests = self.requests
        return app

    async def _health(self, request: Request) -> Response:
        status = self.requests.status()
        return JSONResponse(status, status_code=200 if status["status"] == "ok" else 503)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        self._require_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "tightfit",
            "max_model_len": self._max_model_len,
        }

    async def _answer(
        self, request: Request, read: Callable[..., Asked], limits: Limits
    ) -> Response:
        with self.requests.place() as place:
            try:
                body = read_body(await _body(request, limits))
            except ClientDisconnect:
                return Response(status_code=_CLIENT_CLOSED)
            self._check_model(body)
            asked = read(body, seed=random.getrandbits(62))
            prompt_ids = await asyncio.to_thread(self._encode, asked)
            stream = place.open(prompt_ids, asked.sampling, self._text.stop_ids)
        answer = Answer(
            stream=stream,
            detokenizer=self._text.detokenizer(),
            asked=asked,
            model=self._model,
            prompt_tokens=len(prompt_ids),
        )
        try:
            await stream.accepted()
        except BaseException:
            stream.close()
            raise
        return _Events(answer) if asked.streams else await _whole(answer, request)

    def _check_model(self, body: Mapping[str, Any]) -> None:
        name = body.get("model")
        if name is not None and not isinstance(name, str):
            raise ApiError(400, "model must be text", param="model", code="invalid_value")
        if name:
            self._require_model(name)

    def _require_model(self, name: str) -> None:
        if name != self._model:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist here, only {self._model!r}",
                param="model",
                code="model_not_found",
            )

    def _encode(self, asked: Asked) -> list[int]:
        """Token ids of a prompt; takes long for long texts.

        Raises:
            ApiError: 400 if there are none, or unknown ones, or the chat template fails.
        """
        prompt = asked.prompt
        try:
            if isinstance(prompt, str):
                ids = self._text.encode(prompt)
            elif asked.is_chat:
                ids = self._text.encode_chat([one for one in prompt if not isinstance(one, int)])
            else:
                ids = [one for one in prompt if isinstance(one, int)]
        except TightfitError as error:
            raise ApiError(400, error.message, param="messages", code="invalid_value") from None
        if not ids:
            raise ApiError(400, "the prompt has no tokens", param="prompt", code="invalid_value")
        wrong = next((one for one in ids if not 0 <= one < self._vocab_size), None)
        if wrong is not None:
            raise ApiError(
                400,
                f"token id {wrong} is not in the vocabulary of {self._vocab_size}",
                param="prompt",
                code="invalid_value",
            )
        return ids


class _Events(StreamingResponse):
    """Server-sent events that end the request, however they end."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(
            answer.events(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._stream = answer.stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


async def _whole(answer: Answer, request: Request) -> Response:
    """An answer at once, unless the client leaves before it is there."""
    work = asyncio.ensure_future(answer.whole())
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(work.result()) if work.done() else Response(status_code=_CLIENT_CLOSED)
    finally:
        work.cancel()
        gone.cancel()
        answer.stream.close()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, which is measured while it arrives, whatever its headers say.

    Raises:
        ApiError: 408, 413 or 415.
        ClientDisconnect: it ends early.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be application/json")
    too_large = ApiError(413, f"the body is larger than {limits.max_body_bytes} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.read_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408, f"the body took longer than {limits.read_seconds:g} s", headers=_CLOSE
        ) from None
    return bytes(body)


_CLOSE = {"Connection": "close"}


class _Gate:
    """Lets in who has the key, and who means this host."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._key = None if limits.api_key is None else limits.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Request(scope))
            except ApiError as error:
                await _error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._limits.only_local_names and name.lower() not in LOOPBACK_NAMES:
            raise ApiError(403, f"this server answers to {', '.join(LOOPBACK_NAMES)} only")
        if self._key is None or request.url.path == "/health":
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        # Headers are latin-1, so that every byte of them comes back.
        given = key.strip().encode("latin-1")
        if kind.lower() != "bearer" or not hmac.compare_digest(given, self._key):
            raise ApiError(
                401,
                "the API key is wrong or missing",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _error_response(error: ApiError) -> Response:
    return JSONResponse(error.to_json(), status_code=error.status, headers=error.headers)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: an unknown path, or a wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    headers = dict(error.headers or {})
    return _error_response(ApiError(error.status_code, message, headers=headers))


async def _bug(_: Request, error: Exception) -> Response:
    return _error_response(ApiError(500, f"an error of the server: {type(error).__name__}"))
