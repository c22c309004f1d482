"""vLLM's arguments, one by one, as fields of `PlanOptions`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any

from tightfit.errors import UsageError
from tightfit.planner.options import PlanOptions
from tightfit.planner.vllm_flags import (
    ALIASES,
    ENVIRONMENT,
    ENVIRONMENT_MATTERS,
    HARMLESS_VALUES,
    KINDS,
    MATTERS,
    REMOVED,
    REMOVED_MATTERS,
    SHORT,
    Kind,
)

_FIELDS = frozenset(one.name for one in fields(PlanOptions))
_NUMBER = re.compile(r"-?\d[\d.]*[kKmMgGtT]?")
_SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}


@dataclass(slots=True)
class Arguments:
    """What has been read so far; later values win, as in argparse."""

    version: str | None = None
    """Of vLLM; without it the newest decides which flags there are."""
    options: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    revision: str | None = None
    warnings: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Keep something that the user should know."""
        self.warnings.append(text)

    def read(self, words: Sequence[str]) -> list[str]:
        """Read the words of a command line, and give back those that are no flags.

        Raises:
            UsageError: a value that vLLM would refuse, or none where one is needed.
        """
        positional: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word == "--":
                continue
            if not word.startswith("-") or _NUMBER.fullmatch(word):
                positional.append(word)
                continue
            self._flag(word, rest)
        return positional

    def _flag(self, word: str, rest: list[str]) -> None:
        spelled, equals, text = word.partition("=")
        if digit := re.fullmatch(r"-O(\d)", spelled):
            spelled, equals, text = "-O", "=", digit[1]
        head, *keys = spelled.lstrip("-").split(".")
        long = spelled.startswith("--")
        name = _dest(head) if long else SHORT.get(head, head)
        if name == "optimization_level" and not long:
            level = text if equals else rest[0] if rest else ""
            name = name if len(level) == 1 and not keys else "compilation_config"
        negated = long and name.startswith("no_") and name not in KINDS
        name = name.removeprefix("no_") if negated else name
        kind = KINDS.get(name)
        if kind is None:
            following = not equals and bool(rest) and not rest[0].startswith("-")
            taken = " " + rest.pop(0) if following else ""
            self.warn(f"unknown flag {word}{taken}: left out")
        elif kind == "bool":
            if not equals and rest and rest[0].lower() in ("true", "false"):
                text = rest.pop(0)
            self.put(name, (text.lower() != "false") != negated, spelled)
        elif kind == "maybe":
            if not equals and rest and not rest[0].startswith("-"):
                rest.pop(0)
            self.put(name, None, spelled)
        elif kind in ("ints", "list"):
            values = [text] if equals else []
            while rest and (not rest[0].startswith("-") or _NUMBER.fullmatch(rest[0])):
                values.append(rest.pop(0))
            self.put(name, values, spelled)
        else:
            if not equals:
                if not rest:
                    raise UsageError(f"{spelled} has no value", hint="the command ends there")
                text = rest.pop(0)
            self.put(name, _nested(keys, text, spelled) if keys else text, spelled)

    def value(self, key: str, value: Any) -> None:
        """Take one entry of a YAML file or of a Python call, whose values have types already.

        Raises:
            UsageError: a value that vLLM would refuse.
        """
        name = _dest(key)
        if name not in KINDS:
            self.warn(f"unknown flag {key}: left out")
        elif value is not None:
            self.put(name, value, key)

    def environment(self, variables: Mapping[str, str]) -> None:
        """Take environment variables; a flag that says the same wins.

        Raises:
            UsageError: a value that vLLM would refuse.
        """
        for variable, text in variables.items():
            if variable in ENVIRONMENT:
                name, kind = ENVIRONMENT[variable]
                value = text not in ("0", "") if kind == "bool" else _read(kind, text, variable)
                self.options.setdefault(name, value)
            elif variable in ENVIRONMENT_MATTERS:
                self.warn(f"{variable} can change memory, and is not modelled")
            if variable == "VLLM_MM_INPUT_CACHE_GIB":
                self.warn(f"{variable} is gone since 0.15: --mm-processor-cache-gb replaces it")
            elif variable == "VLLM_CPU_KVCACHE_SPACE":
                self.warn(
                    f"{variable} is a legacy setting: --kv-cache-memory-bytes or "
                    "--gpu-memory-utilization replace it"
                )
            elif variable == "VLLM_USE_V1" and text == "0":
                self.warn("VLLM_USE_V1=0 is the engine before V1, which is not modelled")

    def put(self, name: str, value: Any, spelled: str) -> None:
        """Store one flag in its place."""
        name = ALIASES.get(name, name)
        if name in ("model", "model_tag"):
            self.model = str(value)
        elif name == "revision":
            self.revision = str(value)
        elif name == "config":
            pass
        elif name in REMOVED:
            self._removed(name, value, spelled)
        elif name not in MATTERS or str(value) in HARMLESS_VALUES.get(name, ()):
            self.ignored.append(spelled)
        elif name not in _FIELDS:
            if value not in (False, None):
                self.warn(f"{spelled} can change memory, and is not modelled")
        else:
            self._store(name, value, spelled)

    def _store(self, name: str, value: Any, spelled: str) -> None:
        read = _read(KINDS[name], value, spelled)
        if name == "optimization_level":
            level = re.fullmatch(r"O?([0-3])", str(read))
            if level is None:
                raise UsageError(f"{spelled} {read} is no level", hint="0 to 3")
            read = int(level[1])
            if before(self.version, "0.12"):
                name, read = "compilation_config", {"mode": read}
        if name == "compilation_config":
            read = self._compilation(read)
        if isinstance(read, dict):
            read = _merged(self.options.get(name, {}), read)
        if name == "quantization" and read == "None":
            return
        self.options[name] = read

    def _compilation(self, given: Any) -> dict[str, Any]:
        """Old keys of a compilation config by their new names."""
        if isinstance(given, int) and not isinstance(given, bool):
            given = {"mode": given}
        if not isinstance(given, dict):
            raise UsageError(f"--compilation-config {given!r} is not JSON", hint="such as '{...}'")
        renamed = dict(given)
        for old, new in (("level", "mode"), ("max_capture_size", "max_cudagraph_capture_size")):
            if old in renamed:
                renamed.setdefault(new, renamed.pop(old))
                self.warn(f"compilation_config.{old} is now called {new}")
        gone = (("use_cudagraph", False, "NONE"), ("full_cuda_graph", True, "FULL"))
        for old, when, mode in gone:
            if old in renamed:
                if renamed.pop(old) is when:
                    renamed.setdefault("cudagraph_mode", mode)
                self.warn(f"compilation_config.{old} is gone: cudagraph_mode replaces it")
        return renamed

    def _removed(self, name: str, value: Any, spelled: str) -> None:
        if str(value) in HARMLESS_VALUES.get(name, ()):
            self.ignored.append(spelled)
            return
        gone = REMOVED[name]
        known = before(self.version, gone.since)
        if not known:
            self.warn(f"{spelled} is gone since vLLM {gone.since}: {gone.successor}")
        elif name in REMOVED_MATTERS:
            self.warn(f"{spelled} can change memory, and is not modelled")
        if name in ("rope_scaling", "rope_theta") and known:
            overrides = {name: _read(KINDS[name], value, spelled)}
            self.options["hf_overrides"] = {**self.options.get("hf_overrides", {}), **overrides}
        elif name == "cuda_graph_sizes":
            sizes = _read("ints", value, spelled)
            if len(sizes) == 1:
                self.options["max_cudagraph_capture_size"] = sizes[0]
            else:
                self.options["cudagraph_capture_sizes"] = sizes
        elif name == "disable_mm_preprocessor_cache" and value is True:
            self.options["mm_processor_cache_gb"] = 0.0


def _dest(name: str) -> str:
    """The name that argparse files a flag under; unambiguous beginnings are enough."""
    name = name.lstrip("-").replace("-", "_")
    if name in KINDS or name in ALIASES:
        return ALIASES.get(name, name)
    if name.startswith("no_"):
        return name
    longer = [known for known in KINDS if known.startswith(name) and known not in REMOVED]
    return longer[0] if len(longer) == 1 and len(name) > 3 else name


def before(version: str | None, first: str) -> bool:
    """Whether a version is older than another, as far as that says; False if it is not known."""
    numbers, known = ([int(n) for n in re.findall(r"\d+", v or "")] for v in (version, first))
    return len(numbers) > 1 and numbers[: len(known)] < known


def _nested(keys: Sequence[str], text: str, spelled: str) -> dict[str, Any]:
    """`a.b=1` as {"a": {"b": 1}}; `a.b+=x,y` appends, and is read as a list."""
    value: Any
    if keys[-1].endswith("+"):
        keys, value = [*keys[:-1], keys[-1][:-1]], text.split(",")
    else:
        try:
            value = json.loads(text)
        except ValueError:
            value = _suffixed(text) if _NUMBER.fullmatch(text) else text
        except RecursionError:
            raise UsageError(f"{spelled} is nested too deeply", hint="check its value") from None
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(old)
    for key, value in new.items():
        before = result.get(key)
        both = isinstance(before, dict) and isinstance(value, dict)
        result[key] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return result


def _suffixed(text: str) -> int:
    """vLLM's `human_readable_int`: decimal factors in lower case, binary ones in upper case.

    Raises:
        ValueError: not such a number.
    """
    text = text.strip()
    scale = _SCALES.get(text[-1:], 1)
    number = text[:-1] if scale > 1 else text
    if scale in (10**3, 10**6, 10**9, 10**12):
        return int(float(number) * scale)
    return int(number) * scale


def _read(kind: Kind, value: Any, spelled: str) -> Any:
    """A value as `PlanOptions` wants it."""
    try:
        if kind == "bool":
            return value if isinstance(value, bool) else str(value).lower() in ("true", "1")
        if kind == "int":
            return int(str(value))
        if kind in ("tokens", "length"):
            if kind == "length" and str(value).strip().lower() in ("auto", "-1"):
                return -1
            return _suffixed(str(value))
        if kind == "float":
            return _finite(float(value))
        if kind == "ints":
            values = value if isinstance(value, list | tuple) else [value]
            words = " ".join(map(str, values)).strip("[]").replace(",", " ").split()
            return tuple(int(word) for word in words)
        if kind == "json" and isinstance(value, str):
            return _json(value)
    except (ValueError, TypeError, OverflowError, RecursionError):
        expected = {"json": "JSON", "ints": "numbers", "bool": "true or false"}.get(
            kind, "a number"
        )
        raise UsageError(f"{spelled} {value!r} is not {expected}", hint="check the value") from None
    return value


def _finite(value: float) -> float:
    if not isfinite(value):
        raise ValueError(value)
    return value


def _json(text: str) -> Any:
    """JSON, or the `image=2,video=1` that 0.8 took as well.

    Raises:
        ValueError: neither.
    """
    try:
        return json.loads(text)
    except ValueError:
        pairs = [pair.partition("=") for pair in text.split(",")]
        if all(key and value.isdigit() for key, _, value in pairs):
            return {key.strip(): int(value) for key, _, value in pairs}
        raise
