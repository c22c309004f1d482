"""A recipe as a document: what users write as YAML or JSON, and manifests keep.

```yaml
scheme: w4a16            # without it only what rules name is quantized
group_size: 64
format: compressed-tensors
rules:                   # the first that matches counts
  - {match: '\\.self_attn\\.', scheme: fp8-channel}
  - {match: 'layers\\.0\\.', keep: true}
kv_cache: fp8
```
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tightfit.errors import UsageError
from tightfit.model.quantization.written import (
    COMPRESSED_TENSORS,
    GROUPED,
    Choice,
    ChoiceError,
    Wish,
    compiled,
)

METHODS = ("rtn", "mse", "gptq", "awq", "smoothquant")
"""How values are chosen, which is no part of a recipe."""
DATA_FREE = ("rtn", "mse")
"""Those of them that need no text."""
SHORTEST_SAMPLE = 8
"""Tokens of a window of text, for those that do."""
_LARGEST_BYTES = 2**22
_KEYS = ("scheme", "group_size", "format", "rules", "kv_cache")
_RULE_KEYS = ("match", "scheme", "group_size", "keep")
KV_CACHE = ("fp8",)


def read_recipe(path: Path) -> dict[str, Any]:
    """The document in a file.

    Raises:
        UsageError: it cannot be read, or is not YAML (of which JSON is a part).
    """
    import yaml  # type: ignore[import-untyped]

    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
        if len(content) > _LARGEST_BYTES:
            raise UsageError(f"{path} is too large for a recipe", hint="at most 4 MiB")
        document = yaml.safe_load(content)
    except OSError as error:
        raise UsageError(
            f"cannot read the recipe {path}: {error.strerror}", hint="check the path"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        lines = " ".join(str(error).split())
        raise UsageError(f"{path} is neither YAML nor JSON: {lines:.200}", hint=_EXAMPLE) from None
    if not isinstance(document, dict):
        raise UsageError(f"the recipe {path} is no mapping", hint=_EXAMPLE)
    return document


def wish_of(
    document: Mapping[str, Any],
    where: str = "the recipe",
    *,
    ignore: Iterable[str] = (),
    flags: Mapping[str, str] = MappingProxyType({}),
) -> Wish:
    """What a recipe asks for; patterns to `ignore` come before its rules.

    Messages name `where` the document is from, or of what an option has said, by key, the `flags`.

    Raises:
        UsageError: an unknown key, scheme or group size, a value of another kind, or a pattern that
            is none.
    """
    _check_keys(document, _KEYS, where)
    origin = {key: flags.get(key, where) for key in ("scheme", "group_size", "format")}
    scheme, size = document.get("scheme"), document.get("group_size")
    form = document.get("format") or COMPRESSED_TENSORS
    default = None if scheme is None else _choice(scheme, size, form, origin)
    rules: list[tuple[str, Choice | None]] = [
        (_pattern(pattern, flags.get("ignore", "--ignore")), None) for pattern in ignore
    ]
    is_used = scheme is not None
    entries = document.get("rules") or []
    if not isinstance(entries, list):
        raise UsageError(f"{where}: rules are no list", hint=_EXAMPLE)
    for number, entry in enumerate(entries, 1):
        here = f"{where}, rule {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("match"), str):
            raise UsageError(f"{here} has no pattern to match", hint=_EXAMPLE)
        _check_keys(entry, _RULE_KEYS, here)
        match = _pattern(entry["match"], here)
        if _keeps(entry, here):
            rules.append((match, None))
            continue
        own = entry.get("scheme")
        if own is None and scheme is None:
            raise UsageError(
                f"{here} ({match!r}) says neither what to make of it nor `keep: true`",
                hint=_EXAMPLE,
            )
        # A group size belongs to its scheme; without one, to all that have groups.
        follows = own in (None, scheme) or (scheme is None and own in GROUPED)
        inherited = size if follows else None
        is_used |= follows and "group_size" not in entry
        said = {"scheme": here} if own is not None else {}
        said |= {"group_size": here} if "group_size" in entry else {}
        chosen = _choice(own or scheme, entry.get("group_size", inherited), form, origin | said)
        rules.append((match, chosen))
    if size is not None and not is_used:
        raise UsageError(
            f"{origin['group_size']}: a group size of {size!r:.40}, which no scheme takes",
            hint=f"it belongs to {', '.join(GROUPED)}, and to rules without a size of their own",
        )
    kv_cache = document.get("kv_cache")
    if kv_cache is not None and kv_cache not in KV_CACHE:
        raise UsageError(
            f"{where}: there is no KV cache in {kv_cache!r}",
            hint="kv_cache: " + ", ".join(KV_CACHE),
        )
    return Wish(default=default, rules=tuple(rules), kv_cache=kv_cache is not None)


def document_of(wish: Wish) -> dict[str, Any]:
    """The recipe that asks for the same."""
    found: dict[str, Any] = {}
    if wish.default is not None:
        found |= _of_choice(wish.default)
    if wish.choices:
        found["format"] = wish.format
    found["rules"] = [
        {"match": pattern, **({"keep": True} if choice is None else _of_choice(choice))}
        for pattern, choice in wish.rules
    ]
    found["kv_cache"] = KV_CACHE[0] if wish.kv_cache else None
    return found


def _of_choice(choice: Choice) -> dict[str, Any]:
    # Group sizes are said in any case, so that no rule inherits another's.
    size = {"group_size": choice.group or -1} if choice.scheme in GROUPED else {}
    return {"scheme": choice.scheme, **size}


def _keeps(entry: Mapping[str, Any], here: str) -> bool:
    keep = entry.get("keep", False)
    if type(keep) is not bool:
        raise UsageError(f"{here}: keep {keep!r:.40} is neither true nor false", hint=_EXAMPLE)
    said = [f"{key} {entry[key]!r:.40}" for key in ("scheme", "group_size") if key in entry]
    if keep and said:
        raise UsageError(
            f"{here} ({entry['match']!r}) says both `keep: true` and {' and '.join(said)}",
            hint="leave out one of them: what is kept stays as it is",
        )
    return keep


def _pattern(pattern: str, where: str) -> str:
    try:
        compiled(pattern)
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from None
    return pattern


def _choice(scheme: Any, group_size: Any, form: Any, origin: Mapping[str, str]) -> Choice:
    """A choice; `origin` says of each of its fields who has given it."""
    good = isinstance(scheme, str) and isinstance(form, str)
    if not good or (group_size is not None and type(group_size) is not int):
        raise UsageError(
            f"{origin['scheme']}: scheme {scheme!r}, group size {group_size!r}, format {form!r}: "
            "two names and a whole number are needed",
            hint=_EXAMPLE,
        )
    try:
        return Choice(scheme=scheme, group_size=group_size, format=form)
    except ChoiceError as error:
        message = f"{origin[error.key]}: {error.message}"
        raise UsageError(message, hint=error.hint) from None


def _check_keys(document: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in document:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}", hint="keys: " + ", ".join(known))


_EXAMPLE = (
    "scheme: w4a16, rules: [{match: '\\.self_attn\\.', scheme: fp8-channel}, "
    "{match: 'layers\\.0\\.', keep: true}]"
)
