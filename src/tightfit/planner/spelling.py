"""Options of a plan as people write them, on a command line, in a sweep or in Python.

vLLM's own spellings: `32k` tokens are 32,000 and `32K` are 32,768, `auto` is a length too, and
dictionaries are JSON (`utils/argparse_utils.py`, `engine/arg_utils.py`). Sizes that vLLM counts in
GiB may carry a unit as well.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin

from tightfit.errors import UsageError
from tightfit.planner.devices import Device, device, this_machine
from tightfit.planner.options import PlanOptions
from tightfit.planner.vllm_arguments import before
from tightfit.planner.vllm_flags import SHORT
from tightfit.units import GiB, parse_bytes, parse_memory, parse_tokens

_DEVICE = ("gpu", "gpu_memory")
_INTERNAL = ("device", "tokenizer_json_bytes", "quantization_recipe")


def option_name(text: str) -> str:
    """The option that a name means: `tp`, `max-model-len`, `max_model_len`, `gpu`.

    Raises:
        UsageError: no such option.
    """
    name = text.strip().lstrip("-").replace("-", "_")
    name = SHORT.get(name, name)
    known = [*_DEVICE, *(n for n in PlanOptions.__annotations__ if n not in _INTERNAL)]
    if name not in known:
        from difflib import get_close_matches

        close = get_close_matches(name, known, n=3) or known
        raise UsageError(f"unknown option {text!r}", hint="options: " + ", ".join(close))
    return name


def plan_options(given: Mapping[str, object]) -> PlanOptions:
    """The options of a plan; what is None, or is not given, is the engine's default.

    Args:
        given: by name; text is read as on the command line, other values are taken as they are.

    Raises:
        UsageError: an unknown option, a value that cannot be read, or is out of range.
    """
    values = {
        option_name(name): read_option(option_name(name), value)
        for name, value in given.items()
        if value is not None and name != "quantization_recipe"
    }
    gpu, gpu_memory = values.pop("gpu", None), values.pop("gpu_memory", None)
    where: Device | None = device(gpu, gpu_memory)
    if where is None and values.get("engine") == "builtin":
        where = this_machine()
    level = values.get("optimization_level")
    if level is not None and before(values.get("engine_version"), "0.12"):
        # There -O is the compilation mode.
        del values["optimization_level"]
        values["compilation_config"] = {"mode": level, **values.get("compilation_config", {})}
    recipe: Any = given.get("quantization_recipe")
    return PlanOptions(device=where, quantization_recipe=recipe, **values)


def read_option(name: str, value: object) -> Any:
    """The value of one option.

    Raises:
        UsageError: it cannot be read as what the option is.
    """
    if name in _DEVICE:
        return str(value)
    kinds = _kinds(name)
    special = _READERS.get(name)
    if special is not None and (isinstance(value, str) or str not in kinds):
        return special(_flag(name), value)
    if isinstance(value, str):
        return _from_text(_flag(name), value, kinds)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    if type(value) not in kinds:
        words = " or ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"{_flag(name)} {value!r} is of the wrong type", hint=f"give {words}")
    return value


@cache
def _kinds(name: str) -> tuple[type, ...]:
    """The types that a field takes, without None."""
    kind = PlanOptions.__annotations__[name]
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return tuple(get_origin(one) or one for one in options if one is not type(None))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _from_text(flag: str, text: str, kinds: tuple[type, ...]) -> Any:
    if bool in kinds:
        words = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
        if text.lower() not in words:
            raise UsageError(f"{flag} {text!r} is neither true nor false", hint="true or false")
        return words[text.lower()]
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                raise UsageError(f"{flag} {text!r} is not a number", hint="a number") from None
    return text


def _length(flag: str, value: object) -> int:
    if isinstance(value, str) and value.lower() == "auto":
        return -1
    return _tokens(flag, value)


def _tokens(flag: str, value: object) -> int:
    return parse_tokens(value) if isinstance(value, str) else _whole(flag, value)


def _bytes(flag: str, value: object) -> int:
    return parse_memory(value) if isinstance(value, str) else _whole(flag, value)


def _whole(flag: str, value: object) -> int:
    if type(value) is not int:
        raise UsageError(f"{flag} {value!r} is not a whole number", hint="a whole number")
    return value


def _gib(flag: str, value: object) -> float:
    """A number of GiB, or a size with its unit."""
    text = str(value).strip()
    number = float(text) if text.replace(".", "", 1).isdecimal() else parse_bytes(text) / GiB
    if not math.isfinite(number):
        raise UsageError(f"{flag} {text} is out of range", hint="a size such as 4GiB")
    return number


def _sizes(flag: str, value: object) -> tuple[int, ...]:
    """Numbers between commas or spaces, or a list of them."""
    words = (
        str(value).strip("[]").replace(",", " ").split()
        if isinstance(value, str | int)
        else [str(one) for one in value]
        if isinstance(value, list | tuple)
        else []
    )
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(
            f"{flag} {value!r} is not a list of numbers",
            hint="write it as 1,2,4,8",
        )
    return tuple(int(word) for word in words)


def _object(flag: str, value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    try:
        document = json.loads(str(value))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{flag} {str(value)[:80]!r} is not JSON ({str(error)[:80]})",
            hint=f"write it as {flag} '{{\"name\": 1}}' or {flag}.name=1",
        ) from None
    if not isinstance(document, dict):
        raise UsageError(
            f"{flag} {str(value)[:80]} is not a JSON object",
            hint=f"write it as {flag} '{{\"name\": 1}}' or {flag}.name=1",
        )
    return document


def _compilation(flag: str, value: object) -> dict[str, Any]:
    """A number alone is the compilation mode."""
    text = str(value).strip()
    if isinstance(value, int | str) and text.isascii() and text.isdecimal():
        return {"mode": int(text)}
    return _object(flag, value)


_READERS: Mapping[str, Callable[[str, object], Any]] = {
    "max_model_len": _length,
    "max_num_batched_tokens": _tokens,
    "kv_cache_memory_bytes": _bytes,
    "cudagraph_capture_sizes": _sizes,
    "compilation_config": _compilation,
    "hf_overrides": _object,
    "limit_mm_per_prompt": _object,
    "mm_processor_kwargs": _object,
    "mm_processor_cache_gb": _gib,
    "cpu_offload_gb": _gib,
    "kv_offloading_size": _gib,
    "cpu_kvcache_space": _gib,
}
