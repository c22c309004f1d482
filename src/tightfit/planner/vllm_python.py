"""Read a call of vLLM's `LLM(...)` or `EngineArgs(...)` as the options of a plan; runs nothing."""

import ast
import re

from tightfit.errors import UsageError
from tightfit.planner.vllm_arguments import Arguments
from tightfit.planner.vllm_command import ParsedCommand

_NAMES = {"LLM": "llm", "EngineArgs": "llm", "AsyncEngineArgs": "server"}


def parse_call(text: str, version: str | None = None) -> ParsedCommand:
    """Read the first such call in a piece of Python.

    Raises:
        UsageError: not Python, no such call, or a value that vLLM would refuse.
    """
    start = re.search(r"\b(?:LLM|EngineArgs|AsyncEngineArgs)\s*\(", text)
    assert start is not None
    try:
        tree = ast.parse(_balanced(text[start.start() :]))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"the call of vLLM is not Python: {type(error).__name__}",
            hint='write it as LLM(model="MODEL", max_model_len=8192)',
        ) from error
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
    read = Arguments(version=version)
    model = None
    for position, value in enumerate(call.args[:1]):
        model = str(_literal(value, f"argument {position}", read) or "") or None
    for keyword in call.keywords:
        if keyword.arg is None:
            read.warn("arguments behind ** cannot be seen")
        else:
            read.value(keyword.arg, _literal(keyword.value, keyword.arg, read))
    name = call.func.id if isinstance(call.func, ast.Name) else "LLM"
    return ParsedCommand(
        model=model or read.model,
        options=read.options,
        entrypoint=_NAMES.get(name, "llm"),
        revision=read.revision,
        warnings=tuple(read.warnings),
        ignored=tuple(read.ignored),
    )


def _literal(node: ast.expr, name: str, read: Arguments) -> object:
    try:
        value: object = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        read.warn(f"{name} is not a plain value: left out")
        return None
    return value


def _balanced(text: str) -> str:
    """The text up to the parenthesis that closes its first one, strings aside."""
    depth, quote, at = 0, "", 0
    while at < len(text):
        char = text[at]
        if quote:
            if char == "\\":
                at += 1
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                return text[: at + 1]
        at += 1
    return text
