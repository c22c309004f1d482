"""How two quantizations differ, in the words of the command line."""

from collections.abc import Iterator, Mapping
from typing import Any

from tightfit.sharding.differing import difference_of, was_and_is

_RECIPE: Mapping[str, str] = {
    "scheme": "--scheme",
    "group_size": "--group-size",
    "format": "--format",
    "kv_cache": "--kv-cache",
}
_CALIBRATION: Mapping[str, str] = {
    "backend": "--backend",
    "samples": "--calibration-samples",
    "length": "--calibration-length",
    "seed": "--seed",
}


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first difference between what is `there` and a job's identity `here`; None if none."""
    return next(_differences(there, here), None)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for key, now in here.items():
        was = there.get(key)
        if was == now:
            continue
        if isinstance(was, Mapping) and key == "recipe":
            yield from _of_recipes(was, now)
        elif isinstance(was, Mapping) and key == "calibration":
            yield from _of_calibrations(was, now)
        else:
            yield difference_of(key, was, now)


def _of_recipes(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key, flag in _RECIPE.items():
        if was.get(key) != now.get(key):
            yield was_and_is(flag, was.get(key), now.get(key))
    rules = [tuple(map(_rule, one.get("rules") or ())) for one in (was, now)]
    # A rule that both have says nothing, unless it is their order that differs.
    only = [[rule for rule in mine if rule not in rules[1 - i]] for i, mine in enumerate(rules)]
    before, after = ("; ".join(some) or None for some in (only if any(only) else rules))
    yield was_and_is("--ignore, or a rule of --recipe,", before, after)


def _rule(rule: Any) -> str:
    if not isinstance(rule, Mapping):
        return repr(rule)
    size = f" g{rule['group_size']}" if "group_size" in rule else ""
    return f"{rule.get('match')!r} {'kept' if rule.get('keep') else rule.get('scheme')}{size}"


def _of_calibrations(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if not was or not now:
        yield was_and_is("--calibration", "given" if was else None, "given" if now else None)
    for key, flag in _CALIBRATION.items():
        if was.get(key) != now.get(key):
            yield was_and_is(flag, was.get(key), now.get(key))
    yield "the text of --calibration" + (" is" if "seed" in now else ", or --seed, is") + " another"
