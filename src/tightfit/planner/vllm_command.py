"""Read what people already have, a `vllm serve` line or its YAML file, as the options of a plan.

A command is read as a shell and vLLM's parser read it: environment in front, containers around it,
dashes or underscores, `--flag value` or `--flag=value`, dotted keys, `4k` (4,000) and `4K` (4,096).
vLLM is not imported; its flags are the table in `vllm_flags`.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from tightfit.errors import ConfigError, UsageError
from tightfit.planner.vllm_arguments import Arguments

MAX_TEXT = 2**16
"""Characters of a command: what Linux lets one line of a script have is not much more."""
MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedCommand:
    """A command as options of a plan.

    `options` has fields of `PlanOptions` that the command sets, and `engine_version` if an image's
    tag says it; what is not there is the engine's default.
    """

    model: str | None
    options: Mapping[str, Any]
    entrypoint: str = "server"
    revision: str | None = None
    warnings: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    """Flags that do not matter to memory."""


def parse_command(text: str, version: str | None = None) -> ParsedCommand:
    """Read a command line: `vllm serve`, `python -m vllm...`, `docker run`, or `LLM(...)`.

    Args:
        text: the command.
        version: of vLLM, which knows the flags, where an image's tag does not say it.

    Raises:
        UsageError: no command of vLLM, quotes that do not close, or a value that vLLM would refuse.
        ConfigError: the file that `--config` names cannot be read.
    """
    if len(text) > MAX_TEXT:
        raise UsageError(f"the command has {len(text):,} characters", hint=f"at most {MAX_TEXT:,}")
    if "\0" in text:
        raise UsageError("the command holds a null byte", hint="copy it again, as text")
    if re.search(r"\b(?:LLM|EngineArgs|AsyncEngineArgs)\s*\(", text):
        from tightfit.planner.vllm_python import parse_call

        return parse_call(text, version)
    found = _Invocation()
    _find(_segments(text), found)
    if found.arguments is None:
        raise UsageError(
            f"no command of vLLM in {_short(text)!r}",
            hint='write it as "vllm serve MODEL --max-model-len 8192"',
        )
    read = Arguments(version=version or found.version)
    if found.version is not None:
        read.options["engine_version"] = found.version
    for warning in found.warnings:
        read.warn(warning)
    for path in _config_files(found.arguments):
        _read_config(Path(path), read)
    positional = read.read(found.arguments)
    model = positional[0] if positional else None
    if len(positional) > 1:
        read.warn("not understood, and left out: " + " ".join(positional[1:4]))
    read.environment(found.environment)
    for name in (name for name in (model, read.model) if name and "$" in name):
        read.warn(f"{name} is not known here: name the model")
        model, read.model = None, None
    return _parsed(read, model, found.entrypoint)


def parse_config_file(path: Path | str, version: str | None = None) -> ParsedCommand:
    """Read the YAML file of `vllm serve --config`.

    Raises:
        ConfigError: no such file, too large, or not a YAML mapping of flags.
        UsageError: a value that vLLM would refuse.
    """
    read = Arguments(version=version)
    _read_config(Path(path), read)
    return _parsed(read, None, "server")


def _parsed(read: Arguments, model: str | None, entrypoint: str) -> ParsedCommand:
    return ParsedCommand(
        model=model or read.model,
        options=read.options,
        entrypoint=entrypoint,
        revision=read.revision,
        warnings=tuple(dict.fromkeys(read.warnings)),
        ignored=tuple(dict.fromkeys(read.ignored)),
    )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


_SEPARATOR = re.compile(r"[;|&]+")
_REDIRECTION = re.compile(r"(?<=\s)(?:\d|&)?>{1,2}\s*(?:&\d|[^\s'\"&|;]+)")
_COMMENT = re.compile(r"(?m)(^|[ \t])#[^'\"\n]*$")


def _segments(text: str) -> Iterator[list[str]]:
    """The words of each simple command, without comments and redirections."""
    text = re.sub(r"(?m)^\s*\$ ", "", text)
    text = _COMMENT.sub(r"\1", text)
    text = re.sub(r"[ \t]*[\\`^]\r?\n", " ", text)
    text = _REDIRECTION.sub(" ", text).replace("\n", " ; ").replace("\r", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    try:
        for word in lexer:
            if _SEPARATOR.fullmatch(word):
                yield words
                words = []
            else:
                words.append(word)
    except ValueError as error:
        raise UsageError(
            f"the command cannot be read: {str(error).lower()}", hint="check its quotes"
        ) from error
    yield words


_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_PYTHON = re.compile(r"(?:.*/)?python(?:3(?:\.\d+)?)?")
_CONTAINERS = {"docker", "podman", "nerdctl"}
_ALONE = {
    "--rm",
    "--init",
    "--privileged",
    "--read-only",
    "--detach",
    "--interactive",
    "--tty",
    "--publish-all",
    "--no-healthcheck",
    "--oom-kill-disable",
    "--sig-proxy",
    "--quiet",
}
"""Options of `docker run` that take no value."""
_TAG = re.compile(r"v?(\d+\.\d+\.\d+)")
_MODULES = {"vllm.entrypoints.openai.api_server", "vllm.entrypoints.api_server"}
_OFFLINE = {"bench", "run-batch", "collect-env"}


@dataclass(slots=True)
class _Invocation:
    """Where vLLM is called in a text."""

    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] | None = None
    entrypoint: str = "server"
    version: str | None = None
    warnings: list[str] = field(default_factory=list)


def _find(segments: Iterable[list[str]], found: _Invocation, depth: int = 0) -> None:
    """Look through commands until one is vLLM's; assignments before it count."""
    for segment in segments:
        words = [Template(word).safe_substitute(found.environment) for word in segment]
        if words[:1] == ["export"]:
            words = words[1:]
        while words and (match := _ASSIGNMENT.fullmatch(words[0])):
            found.environment[match[1]] = match[2]
            words = words[1:]
        if _container(words, found, depth) or _program(words, found, depth):
            return


def _container(words: Sequence[str], found: _Invocation, depth: int) -> bool:
    """`docker run [options] IMAGE arguments`."""
    start = next((i for i, w in enumerate(words[:8]) if w.rsplit("/", 1)[-1] in _CONTAINERS), None)
    if start is None or "run" not in words[start:]:
        return False
    at = list(words).index("run", start) + 1
    program: list[str] = []
    while at < len(words) and words[at].startswith("-"):
        name, equals, value = words[at].partition("=")
        alone = name in _ALONE or re.fullmatch(r"-[itdP]+", name) is not None
        if not equals and not alone:
            at += 1
            value = words[at] if at < len(words) else ""
        if name in ("-e", "--env") and (match := _ASSIGNMENT.fullmatch(value)):
            found.environment[match[1]] = match[2]
        elif name == "--entrypoint":
            program = value.split()
        elif name == "--env-file":
            found.warnings.append(f"--env-file {value} was not read")
        at += 1
    if at >= len(words):
        return False
    image, rest = words[at], [*program, *words[at + 1 :]]
    match = _TAG.match(image.rsplit(":", 1)[1]) if ":" in image else None
    if match and "vllm" in image and "nvcr.io" not in image:
        found.version = match[1]
    elif "vllm" in image:
        found.warnings.append(f"the image {image} does not name a version of vLLM")
    if "vllm" not in image and not _program(rest, found, depth):
        return False
    if found.arguments is None and not _program(rest, found, depth):
        found.arguments = rest[1:] if rest[:1] == ["serve"] else rest
    return True


def _program(words: Sequence[str], found: _Invocation, depth: int) -> bool:
    """A program that is vLLM, after `nohup`, `uv run`, `numactl ...` and the like."""
    for at, word in enumerate(words):
        name, rest = word.rsplit("/", 1)[-1], list(words[at + 1 :])
        if name in ("bash", "sh", "zsh") and len(rest) > 1 and re.fullmatch(r"-\w*c", rest[0]):
            if depth < 3:
                _find(_segments(rest[1]), found, depth + 1)
            return found.arguments is not None
        if match := _ASSIGNMENT.fullmatch(word):
            found.environment[match[1]] = match[2]
        elif name == "vllm" and rest and not rest[0].startswith("-"):
            offline = rest[0] in _OFFLINE
            found.entrypoint = "llm" if offline else "server"
            skip = 2 if rest[0] == "bench" else 1
            found.arguments = rest[skip:]
            return True
        elif _PYTHON.fullmatch(word) and "-m" in rest[:4]:
            module = rest[rest.index("-m") + 1 :]
            if module[:1] and module[0] in _MODULES:
                found.arguments = module[1:]
                return True
            if module[:2] == ["vllm", "serve"] or module[:1] == ["vllm.entrypoints.cli.main"]:
                found.arguments = module[2:]
                return True
        elif word in _MODULES:
            found.arguments = rest
            return True
    return False


def _config_files(arguments: Sequence[str]) -> Iterator[str]:
    for at, word in enumerate(arguments):
        if word.startswith("--config="):
            yield word.partition("=")[2]
        elif word == "--config" and at + 1 < len(arguments):
            yield arguments[at + 1]


def _read_config(path: Path, read: Arguments) -> None:
    """Give the keys of a YAML file to the reader of arguments, as vLLM does."""
    import yaml  # type: ignore[import-untyped]

    hint = "it is vLLM's YAML file of flags, such as `max-model-len: 8192`"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes", hint=hint)
    try:
        document = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} is not YAML: {reason}", hint=hint) from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not a mapping of flags", hint=hint)
    for key, value in document.items():
        read.value(str(key), value)
