"""How a user names matrices that are to stay as they are: short names, and patterns."""

import re
from collections.abc import Collection, Iterable

_LAYER = re.compile(r"(.*?\.)(\d+)\.")


def short_names(modules: Iterable[str]) -> tuple[str, ...]:
    """Names without the numbers of layers and experts: `model.layers.*.mlp.down_proj`."""
    return tuple(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in modules))


def ignoring(modules: Iterable[str], others: Collection[str]) -> str:
    """A pattern, as `--ignore` takes it, that matches modules and none of the `others`.

    It names layers only where it has to. All experts of a layer go together.
    """
    siblings: dict[str, list[str]] = {}
    for module in modules:
        siblings.setdefault(_parent(module), []).append(module)
    return "|".join(_matching(parent, names, others) for parent, names in siblings.items())


def either(patterns: Iterable[str]) -> str:
    """A pattern for any of some."""
    found = list(dict.fromkeys(patterns))
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"


def _parent(module: str) -> str:
    if ".experts." in module:
        return r"\.experts\."
    *_, parent, _ = ("", *module.split("."))
    return "" if parent.isdecimal() or not parent else rf"{re.escape(parent)}\."


def _matching(parent: str, names: Collection[str], others: Iterable[str]) -> str:
    last = "" if "experts" in parent else either(re.escape(n.rpartition(".")[2]) for n in names)
    end = f"{parent}{last}$" if last else parent
    if not any(re.search(end, other) for other in others):
        return end
    layers: dict[str, list[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        prefix, number = ("", "") if match is None else match.groups()
        layers.setdefault(prefix, []).append(number)
    return "|".join(
        rf"^{re.escape(prefix)}{either(numbers)}\b.*{end}" if prefix else f"^{end}"
        for prefix, numbers in layers.items()
    )
