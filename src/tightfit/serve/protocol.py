"""Requests of OpenAI's completions and chat completions, read and checked.

Unknown fields are ignored, as clients send many. Known ones of a wrong type or value are refused,
and so are those that would change the answer in a way that we have not: better no answer than
another one than was asked for.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.runtime.options import SamplingParams
from tightfit.runtime.text import Message
from tightfit.serve.errors import ApiError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
_LARGEST = 2**31 - 1
_ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request that can be answered.

    `prompt` is text, token ids, or a conversation.
    """

    prompt: str | list[int] | list[Message]
    sampling: SamplingParams
    stops: tuple[str, ...]
    streams: bool
    include_usage: bool

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a conversation."""
        return isinstance(self.prompt, list) and isinstance(self.prompt[0], Mapping)


def read_body(body: bytes) -> Mapping[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: 400.
    """
    try:
        document = json.loads(body.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise ApiError(400, "the body is not a JSON object")
    return document


def read_completion(body: Mapping[str, Any], *, seed: int) -> Asked:
    """A request to `/v1/completions`; `seed` is for those that give none.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = _Fields(body)
    fields.refuse("echo", "suffix", "best_of")
    limit = fields.whole("max_tokens", 1, _LARGEST, default=16)
    return _asked(fields, _prompt(fields), max_tokens=limit, seed=seed)


def read_chat(body: Mapping[str, Any], *, seed: int) -> Asked:
    """A request to `/v1/chat/completions`, likewise.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = _Fields(body)
    fields.refuse("tools", "functions", "audio")
    if fields.get("response_format", dict, default={"type": "text"}).get("type") != "text":
        raise fields.wrong("response_format", "can only be text")
    limit = fields.whole("max_completion_tokens", 1, _LARGEST)
    if limit is None:
        limit = fields.whole("max_tokens", 1, _LARGEST)
    return _asked(fields, _messages(fields), max_tokens=limit, seed=seed)


def _asked(
    fields: "_Fields",
    prompt: str | list[int] | list[Message],
    *,
    max_tokens: int | None,
    seed: int,
) -> Asked:
    fields.refuse("logprobs", "top_logprobs", "logit_bias", "presence_penalty")
    fields.refuse("frequency_penalty")
    if fields.whole("n", 1, _LARGEST, default=1) != 1:
        raise fields.wrong("n", "can only be 1")
    top_k = fields.whole("top_k", -1, _LARGEST, default=0)
    top_p = fields.number("top_p", 0, 1, default=1.0)
    if top_p == 0:
        raise fields.wrong("top_p", "must be greater than 0")
    asked_seed = fields.whole("seed", -(2**63), 2**63 - 1, default=seed)
    streams = fields.get("stream", bool, default=False)
    stream_options = fields.get("stream_options", dict, default={})
    if stream_options and not streams:
        raise fields.wrong("stream_options", "needs stream = true")
    return Asked(
        prompt=prompt,
        sampling=SamplingParams(
            temperature=fields.number("temperature", 0, 2, default=1.0),
            top_k=max(top_k or 0, 0),
            top_p=top_p,
            # Counter-based generators want what is not negative.
            seed=(asked_seed or 0) % 2**63,
            max_tokens=max_tokens,
            ignore_eos=fields.get("ignore_eos", bool, default=False),
        ),
        stops=_stops(fields),
        streams=streams,
        include_usage=_Fields(stream_options).get("include_usage", bool, default=False),
    )


def _prompt(fields: "_Fields") -> str | list[int]:
    prompt = fields.get("prompt", str, list)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt
    if isinstance(prompt, str):
        return fields.text("prompt", prompt)
    if prompt and all(type(one) is int for one in prompt):
        return list(prompt)
    if prompt and all(isinstance(one, str | list) for one in prompt):
        raise fields.wrong("prompt", "can only be one prompt: send several requests")
    raise fields.wrong("prompt", "must be text, or a list of token ids that is not empty")


def _messages(fields: "_Fields") -> list[Message]:
    messages = fields.get("messages", list)
    if not messages:
        raise fields.wrong("messages", "must not be empty")
    return [_message(fields, i, message) for i, message in enumerate(messages)]


def _message(fields: "_Fields", i: int, message: object) -> Message:
    name = f"messages[{i}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise fields.wrong(name, "must be an object with a role")
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise fields.wrong(f"{name}.content", "can only have parts of text")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise fields.wrong(f"{name}.content", "must be text")
    return {
        "role": fields.text(f"{name}.role", message["role"]),
        "content": fields.text(f"{name}.content", content),
    }


def _stops(fields: "_Fields") -> tuple[str, ...]:
    stops = fields.get("stop", str, list, default=[])
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > MAX_STOPS:
        raise fields.wrong("stop", f"can have {MAX_STOPS} texts at most")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise fields.wrong("stop", f"must be text of 1 to {MAX_STOP_CHARACTERS} characters")
        fields.text("stop", stop)
    return tuple(stops)


class _Fields:
    """A JSON object whose fields are looked at one by one; null means absent."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def wrong(self, name: str, why: str) -> ApiError:
        return ApiError(400, f"{name} {why}", param=name, code="invalid_value")

    def refuse(self, *names: str) -> None:
        """Fields that we cannot honour, unless they ask for nothing."""
        for name in names:
            if self._body.get(name) not in (None, False, 0, "", [], {}, *_NOTHING.get(name, ())):
                raise ApiError(
                    400, f"{name} is not supported", param=name, code="unsupported_parameter"
                )

    def get(self, name: str, *kinds: type, default: Any = _ABSENT) -> Any:
        value = self._body.get(name)
        if value is None:
            if default is _ABSENT:
                raise self.wrong(name, "is missing")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            told = [kind for kind in kinds if not (kind is int and float in kinds)]
            words = " or ".join(_WORDS[kind] for kind in told)
            raise self.wrong(name, f"must be {words}")
        return value

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        value: int | None = self.get(name, int, default=default)
        if value is not None and not low <= value <= high:
            raise self.wrong(name, f"must be a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.get(name, int, float, default=default)
        if not low <= value <= high or not math.isfinite(value):
            raise self.wrong(name, f"must be a number from {low} to {high}")
        return float(value)

    def text(self, name: str, value: str) -> str:
        """JSON can spell halves of characters, which no tokenizer can read."""
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(name, "has half a character (a lone surrogate)") from None
        return value


_WORDS = {
    str: "text",
    list: "a list",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
}
_NOTHING: Mapping[str, Sequence[object]] = {"best_of": (1,)}


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
