"""Answers as OpenAI's clients expect them: whole, and in chunks of server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from tightfit.runtime.text import Detokenizer
from tightfit.serve.errors import ApiError
from tightfit.serve.protocol import Asked
from tightfit.serve.requests import Stream
from tightfit.serve.stops import StopTexts

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True, kw_only=True)
class Answer:
    """The text of one request while it is being written."""

    stream: Stream
    detokenizer: Detokenizer
    asked: Asked
    model: str
    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: str | None = None
    _id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _created: int = field(default_factory=lambda: int(time.time()))

    async def texts(self) -> AsyncIterator[str]:
        """New text, until `finish_reason` is set.

        Raises:
            ApiError: 503 if the engine has stopped.
        """
        stops = StopTexts(self.asked.stops)
        async for tokens in self.stream.batches():
            self.completion_tokens += len(tokens)
            if self.stream.finish_reason == "stop":
                tokens = tokens[:-1]
            text = stops.add("".join(map(self.detokenizer.add, tokens)))
            if stops.stopped:
                break
            if text:
                yield text
        else:
            text = stops.add(self.detokenizer.finish())
            if not stops.stopped:
                text += stops.finish()
        self.finish_reason = "stop" if stops.stopped else self.stream.finish_reason
        if text:
            yield text

    async def whole(self) -> dict[str, Any]:
        """The document of an answer that is not streamed."""
        text = "".join([text async for text in self.texts()])
        content = (
            {"message": {"role": "assistant", "content": text}}
            if self.asked.is_chat
            else {"text": text}
        )
        return {**self._document([self._choice(content)], chunk=False), "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; what fails on the way is told as the last of them."""
        try:
            if self.asked.is_chat:
                yield self._chunk({"delta": {"role": "assistant", "content": ""}})
            async for text in self.texts():
                piece = {"delta": {"content": text}} if self.asked.is_chat else {"text": text}
                yield self._chunk(piece)
            yield self._chunk({"delta": {}} if self.asked.is_chat else {"text": ""}, last=True)
            if self.asked.include_usage:
                yield _event({**self._document([], chunk=True), "usage": self._usage()})
        except ApiError as error:
            yield _event(error.to_json())
        yield DONE

    def _chunk(self, piece: dict[str, Any], *, last: bool = False) -> bytes:
        choice = self._choice(piece) if last else {**self._choice(piece), "finish_reason": None}
        usage = {"usage": None} if self.asked.include_usage else {}
        return _event({**self._document([choice], chunk=True), **usage})

    def _choice(self, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": self.finish_reason}

    def _document(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        chat = self.asked.is_chat
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else _TEXT
        return {
            "id": ("chatcmpl-" if chat else "cmpl-") + self._id,
            "object": kind,
            "created": self._created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


_TEXT = "text_completion"


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()
