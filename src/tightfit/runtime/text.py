"""Text to tokens and back, with the model's own `tokenizer.json` and chat template.

Only rank 0 needs text. transformers is not imported, as it costs 100 MB: the tokenizer is the
`tokenizers` library's, and the template is rendered as transformers does it
(`utils/chat_template_utils.py: _compile_jinja_template`).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.errors import CheckpointError, MissingExtraError, UsageError

Message = Mapping[str, str]
"""`role` and `content`."""


class Text:
    """A model's tokenizer, chat template and stop tokens.

    Raises:
        CheckpointError: there is no tokenizer.json, or it or a config beside it is damaged.
        MissingExtraError: `tokenizers` is not installed.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtraError("run", "runtime", "tokenizers") from error
        self._label = checkpoint.source.label
        raw = _read(checkpoint, "tokenizer.json")
        if raw is None:
            raise CheckpointError(
                f"{self._label} has no tokenizer.json",
                hint="copy the model's tokenizer files there",
            )
        try:
            self.tokenizer = Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"tokenizer.json in {self._label} cannot be read: {error}",
                hint="download it again, or install a newer `tokenizers`",
            ) from error
        # Files made for training may ask for truncation or padding.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._config = _read_object(checkpoint, "tokenizer_config.json")
        self._special = _special_tokens(
            _read_object(checkpoint, "special_tokens_map.json") | self._config
        )
        self.chat_template = self._find_template(checkpoint)
        self.stop_ids = _stop_ids(
            _read_object(checkpoint, "generation_config.json"), checkpoint.config
        )

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer itself adds."""
        ids: list[int] = self.tokenizer.encode(prompt).ids
        return ids

    @property
    def first_ids(self) -> list[int]:
        """What stands before every text: without it some models, such as Gemma, talk nonsense."""
        first = self.tokenizer.token_to_id(self._special.get("bos_token", ""))
        added = self._config.get("add_bos_token") is True or self.encode("")[:1] == [first]
        return [first] if first is not None and added else []

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the model is to continue.

        Raises:
            UsageError: there is no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise UsageError(
                f"{self._label} has no chat template",
                hint="give the prompt as plain text; base models have no chat format",
            )
        prompt = render_chat(self.chat_template, messages, self._special)
        # The template has written the special tokens already.
        ids: list[int] = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        return ids

    def detokenizer(self) -> "Detokenizer":
        """A fresh one for a new stream of tokens."""
        return Detokenizer(self.tokenizer)

    def _find_template(self, checkpoint: Checkpoint) -> str | None:
        raw = _read(checkpoint, "chat_template.jinja")
        if raw is not None:
            return raw.decode("utf-8", errors="replace")
        template = _read_object(checkpoint, "chat_template.json").get(
            "chat_template", self._config.get("chat_template")
        )
        if isinstance(template, list):
            named = {
                entry.get("name"): entry.get("template")
                for entry in template
                if isinstance(entry, dict)
            }
            template = named.get("default")
        return template if isinstance(template, str) else None


_MOST_HELD = 32
"""Tokens of a character at most, and more: text that is full of U+FFFD itself is told as well."""


class Detokenizer:
    """Tokens to text as they come, never half a character.

    A token alone may be a part of a UTF-8 character, and may read differently after its neighbours
    (leading spaces). So the tokens since the last complete text are decoded twice, without and with
    the new one, and the difference is the new text (as in vLLM's `detokenize_incrementally`).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._told = 0

    def add(self, token_id: int) -> str:
        """The text that this token completes; often empty."""
        self._ids.append(token_id)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._ids) - self._told < _MOST_HELD:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """What is left: an incomplete character shows as U+FFFD."""
        return self._advance(self._new_text())

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._told])
        after = self._tokenizer.decode(self._ids[self._context :])
        return str(after[len(before) :])

    def _advance(self, text: str) -> str:
        self._context, self._told = self._told, len(self._ids)
        return text


def render_chat(template: str, messages: Sequence[Message], special: Mapping[str, str]) -> str:
    """Render a chat template in a sandbox: it comes from a stranger.

    Raises:
        UsageError: the template is broken, or refuses these messages.
        MissingExtraError: `jinja2` is not installed.
    """
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingExtraError("run", "runtime", "jinja2") from error

    class Generation(Extension):
        """`{% generation %}` marks what to train on; here it means nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **special,
        )
    except Exception as error:  # a template can raise anything that Python can
        raise UsageError(
            f"the model's chat template fails: {error}",
            hint="some templates take no system message, or want turns to alternate; "
            "a plain prompt needs no template",
        ) from error


def _stop_ids(generation: Mapping[str, Any], config: Mapping[str, Any]) -> frozenset[int]:
    """The end tokens of generation_config.json, else of config.json: a number or a list."""
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    values = value if isinstance(value, list) else [value]
    return frozenset(v for v in values if isinstance(v, int))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, which are strings or objects with `content`."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if key.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[key] = text
    return found


def _read(checkpoint: Checkpoint, name: str) -> bytes | None:
    return checkpoint.source.read(name) if checkpoint.source.exists(name) else None


def _read_object(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    raw = _read(checkpoint, name)
    try:
        value = json.loads(raw) if raw else {}
    except ValueError as error:
        raise CheckpointError(
            f"{name} in {checkpoint.source.label} is not JSON: {error}", hint="download it again"
        ) from error
    return value if isinstance(value, dict) else {}
