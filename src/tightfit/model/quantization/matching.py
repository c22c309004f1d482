"""Which modules a quantization's lists mean: names, prefixes, wildcards, regular expressions.

Lists may have tens of thousands of entries, so names are looked up in sets, and patterns are
compiled once into a few large ones.
"""

import re
from collections.abc import Callable, Iterable
from fnmatch import translate

from tightfit.errors import ConfigError, UnsupportedModelError

_AT_ONCE = 200
"""Patterns of one compiled alternation."""


class Names:
    """A set of module names, given by patterns."""

    __slots__ = ("_contained", "_exact", "_inside", "_patterns", "_runs")

    def __init__(
        self,
        *,
        exact: Iterable[str] = (),
        inside: Iterable[str] = (),
        contained: Iterable[str] = (),
        patterns: Iterable[str] = (),
    ) -> None:
        """Gather names.

        Args:
            exact: whole names.
            inside: dotted runs of a name, such as `self_attn.q_proj`: all of its submodules too.
            contained: substrings.
            patterns: regular expressions that match from the start.

        Raises:
            ConfigError: a pattern that cannot be compiled.
        """
        self._exact = frozenset(exact)
        self._inside = frozenset(inside)
        self._runs = max((name.count(".") + 1 for name in self._inside), default=0)
        self._contained = tuple(dict.fromkeys(contained))
        self._patterns = _compile(tuple(dict.fromkeys(patterns)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(map(self._has, _spellings(name)))

    def __bool__(self) -> bool:
        return bool(self._exact or self._inside or self._contained or self._patterns)

    def _has(self, name: str) -> bool:
        if name in self._exact or any(text in name for text in self._contained):
            return True
        if self._inside and not self._inside.isdisjoint(_dotted_runs(name, self._runs)):
            return True
        return any(match(name) for match in self._patterns)


def compressed_tensors(entries: Iterable[str]) -> Names:
    """`re:` begins a pattern; anything else is a whole name."""
    exact = [entry for entry in entries if not entry.startswith("re:")]
    return Names(exact=exact, patterns=[e[3:] for e in entries if e.startswith("re:")])


def modules(entries: Iterable[str]) -> Names:
    """Names of modules, from the start or to the end, with everything in them.

    (transformers' `quantizers/quantizers_utils.py: should_convert_module`; vLLM compares whole
    names.)
    """
    wild = [entry for entry in entries if "*" in entry]
    return Names(
        inside=[entry.strip(".") for entry in entries if "*" not in entry],
        patterns=[translate(entry) for entry in wild] + [translate(f"{e}.*") for e in wild],
    )


def _spellings(name: str) -> tuple[str, ...]:
    """Models inside others are called in several ways (vLLM's `modelopt.py` tries them too).

    A section that the text model brought with it has names without what is around it. Towers are
    in `model` since transformers 4.52, in lists more often than in files.
    """
    one, other, alone = "language_model.model.", "model.language_model.", "language_model."
    if name.startswith(one):
        return name, other + name.removeprefix(one), name.removeprefix(alone)
    if name.startswith(other):
        return name, one + name.removeprefix(other)
    if name.startswith(_TOWERS):
        return name, f"model.{name}"
    short = name.removeprefix("model.")
    if short.startswith(_TOWERS):
        return name, short
    return (name, name.removeprefix(alone)) if name.startswith(alone) else (name,)


_TOWERS = ("visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "embed_vision.")


def _dotted_runs(name: str, longest: int) -> Iterable[str]:
    words = name.split(".")
    for first in range(len(words)):
        for last in range(first + 1, min(len(words), first + longest) + 1):
            yield ".".join(words[first:last])


_MOST_REPEATS = 8
"""Of one pattern: each may multiply the time of a match by the length of a name."""

_Match = Callable[[str], re.Match[str] | None]


def _compile(patterns: tuple[str, ...]) -> tuple[_Match, ...]:
    for pattern in patterns:
        if may_explode(pattern):
            raise UnsupportedModelError(
                f"quantization_config has the pattern {pattern[:60]!r}, whose nested or many "
                "repeats could take forever to match",
                hint="list the modules by name",
            )
    found: list[_Match] = []
    for at in range(0, len(patterns), _AT_ONCE):
        group = patterns[at : at + _AT_ONCE]
        try:
            found.append(re.compile("|".join(f"(?:{pattern})" for pattern in group)).match)
        except (re.error, RecursionError, OverflowError):
            found += [_one(pattern) for pattern in group]
    return tuple(found)


def may_explode(pattern: str) -> bool:
    """Whether a repeated group has repeats inside, or there are many in a row."""
    repeats, inside, at = 0, [False], 0
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 1
        elif character == "[":
            closing = pattern.find("]", at + 2)
            at = closing if closing > 0 else len(pattern)
        elif character == "(":
            inside.append(False)
        elif character == ")" and len(inside) > 1:
            repeated = inside.pop()
            if repeated and pattern[at + 1 : at + 2] in ("*", "+", "{"):
                return True
            inside[-1] |= repeated
        elif character in "*+{":
            inside[-1] = True
            repeats += 1
        elif character == "|" and len(inside) == 1:
            repeats = 0
        at += 1
    return repeats > _MOST_REPEATS


def _one(pattern: str) -> _Match:
    try:
        return re.compile(pattern).match
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"quantization_config has the pattern {pattern[:60]!r}, which is no regular "
            f"expression: {error}",
            hint="correct the config.json",
        ) from None
