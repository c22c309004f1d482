"""Arguments as vLLM's parser takes them, made into those that click takes.

vLLM (`utils/argparse_utils.py: FlexibleArgumentParser`) also reads `--max_model_len`, `-O3`, and
keys with dots: `-cc.cudagraph_mode=NONE` and `--limit-mm-per-prompt.image 2` add to a JSON object;
and several numbers after `--cudagraph-capture-sizes`.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

_OBJECTS = (
    "--compilation-config",
    "--hf-overrides",
    "--limit-mm-per-prompt",
    "--mm-processor-kwargs",
)
_SIZES = "--cudagraph-capture-sizes"
_SHORT = {"-cc": "--compilation-config"}


def like_vllm(arguments: Sequence[str]) -> list[str]:
    """The arguments with dashes in names, and dotted keys joined to one JSON object per option."""
    result: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            return [*result, *_flat(objects), word, *words]
        name, equals, value = word.partition("=")
        if name.startswith("-O") and name[2:].isdecimal():
            result += ["--optimization-level", name[2:]]
            continue
        if name.startswith("--"):
            option, dot, rest = name.partition(".")
            name = option.replace("_", "-") + dot + rest
        if name == _SIZES and not equals:
            sizes = []
            while words and re.fullmatch(r"\d+(,\d+)*,?", words[0]):
                sizes.append(words.pop(0))
            result += [name, ",".join(sizes)] if sizes else [name]
            continue
        option, dot, keys = name.partition(".")
        option = _SHORT.get(option, option)
        if not dot or option not in _OBJECTS:
            result.append(name + equals + value)
            continue
        if not equals:
            value = words.pop(0) if words else ""
        target = objects.setdefault(option, {})
        *path, last = keys.split(".")
        for key in path:
            inner = target.setdefault(key, {})
            if not isinstance(inner, dict):
                inner = target[key] = {}
            target = inner
        target[last] = _value(value)
    return [*result, *_flat(objects)]


def _flat(objects: dict[str, dict[str, Any]]) -> list[str]:
    return [word for name, value in objects.items() for word in (name, json.dumps(value))]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
