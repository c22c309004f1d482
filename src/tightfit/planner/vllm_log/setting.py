"""How a start-up was configured, from the two places where vLLM's log says it.

`non-default args: {...}` (or `args: Namespace(...)` before 0.9) has what the user passed, and the
config line of the engine has what became of the rest. Both are Python's `repr`, cut short or with
objects in it; they are searched for plain values, and nothing is evaluated but literals.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.errors import TightfitError
from tightfit.planner.vllm_arguments import Arguments

_ECHO = re.compile(r"(?:non-default args: (\{.*)|args: Namespace(\(.*))")
_ITEM = re.compile(
    r"""['"]?(\w+)['"]?\s*[:=]\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|-?\d+(?:\.\d+)?|True|False)"""
    r"""(?=\s*[,)}\]])"""
)
_MAX_ECHO = 2**16

_CONFIG = {
    "max_seq_len": ("max_model_len", "int"),
    "tensor_parallel_size": ("tensor_parallel_size", "int"),
    "pipeline_parallel_size": ("pipeline_parallel_size", "int"),
    "data_parallel_size": ("data_parallel_size", "int"),
    "decode_context_parallel_size": ("decode_context_parallel_size", "int"),
    "dtype": ("dtype", "dtype"),
    "kv_cache_dtype": ("kv_cache_dtype", "str"),
    "enforce_eager": ("enforce_eager", "bool"),
    "enable_prefix_caching": ("enable_prefix_caching", "bool"),
    "enable_chunked_prefill": ("enable_chunked_prefill", "bool"),
    "chunked_prefill_enabled": ("enable_chunked_prefill", "bool"),
    "load_format": ("load_format", "load_format"),
}
"""Keys of the engine's config line, the option each is, and how it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSetting:
    """The model, and the start-up as fields of `PlanOptions`."""

    model: str | None
    options: Mapping[str, Any]


def echoed_arguments(line: str) -> dict[str, Any] | None:
    """The arguments that a line repeats; None if it is another line."""
    match = _ECHO.search(line)
    if match is None:
        return None
    text = (match[1] or match[2])[:_MAX_ECHO]
    if match[1]:
        value = _literal(text)
        if isinstance(value, dict):
            return {str(key): item for key, item in value.items()}
    found = {name: _literal(item) for name, item in _top_level(text)}
    return {name: value for name, value in found.items() if value is not None}


def _literal(text: str) -> Any:
    """The value that Python would print so, or None."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _top_level(text: str) -> list[tuple[str, str]]:
    """Plain items outside nested brackets."""
    depth, flat, quote = 0, [], ""
    for at, char in enumerate(text):
        inside = bool(quote)
        if quote:
            quote = "" if char == quote and text[at - 1] != "\\" else quote
        elif char in "'\"":
            quote = char
        elif char in "([{<":
            depth += 1
        elif char in ")]}>":
            depth -= 1
        if depth == 1 or (depth == 0 and not inside and char in ")}"):
            flat.append(char)
    return [
        (name, item)
        for name, item in _ITEM.findall("".join(flat))
        if "\\" not in item and len(item) < 4096
    ]


def setting_of(config: str, arguments: Mapping[str, Any]) -> LogSetting:
    """Put both sources together; what the user passed wins."""
    read = Arguments()
    model = None
    if match := re.search(r"model='([^']*)'", config):
        model = match[1]
    found: dict[str, Any] = {}
    for key, (option, kind) in _CONFIG.items():
        match = re.search(rf"(?:^|[ ,]){key}=([^,]*)(?:,|$)", config)
        if match is None or match[1].strip() in ("None", ""):
            continue
        text = match[1].strip()
        if kind == "dtype":
            text = text.removeprefix("torch.")
        elif kind == "load_format":
            text = text.rsplit(".", 1)[-1].lower()
        found[option] = _int(text) if kind == "int" else text == "True" if kind == "bool" else text
    found |= _capture_sizes(config)
    for name, value in {**found, **arguments}.items():
        if name == "dtype" and value == "auto" and "dtype" in found:
            continue
        if name == "max_model_len" and value in (-1, "auto") and "max_model_len" in found:
            continue
        try:
            read.value(name, value)
        except TightfitError:
            continue
    options = {name: value for name, value in read.options.items() if value is not None}
    return LogSetting(model=model or read.model, options=options)


def _capture_sizes(config: str) -> dict[str, Any]:
    """The sizes that were captured, unless the log cuts them short."""
    match = re.search(r"['\"]?cudagraph_capture_sizes['\"]?: ?\[([\d, ]+)\]", config)
    words = match[1].replace(",", " ").split() if match else []
    sizes = [size for word in words if (size := _int(word)) is not None]
    mode = re.search(r"cudagraph_mode['\"]?: ?<?(?:CUDAGraphMode\.)?['\"]?([A-Z_]+|[0-2])", config)
    found: dict[str, Any] = {"cudagraph_capture_sizes": sorted(sizes)} if sizes else {}
    if mode:
        found["compilation_config"] = {"cudagraph_mode": _MODES.get(mode[1], mode[1])}
    return found


_MODES = {"0": "NONE", "1": "PIECEWISE", "2": "FULL"}
"""As versions around 0.10 print them."""


def _int(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None
