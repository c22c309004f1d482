"""The naming of each engine version that rank files can be written for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tightfit.errors import UsageError
from tightfit.model.stored.names import FamilyNames, family_names


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayout:
    """The naming of one engine version; `uneven` layouts need an engine that accepts them."""

    name: str
    uneven: bool
    family: Callable[[str], FamilyNames]
    """The names of an architecture."""


_VLLM_0_32 = StoredLayout(name="vllm-0.32", uneven=False, family=family_names)

LAYOUTS: Mapping[str, StoredLayout] = {
    "vllm-0.32": _VLLM_0_32,
    "builtin": replace(_VLLM_0_32, name="builtin", uneven=True),
}
"""`builtin` has vLLM's names, but heads and widths that do not divide are dealt unevenly."""

DEFAULT_LAYOUT = "vllm-0.32"


def stored_layout(name: str) -> StoredLayout:
    """Find a layout by name.

    Raises:
        UsageError: no such layout.
    """
    if name not in LAYOUTS:
        raise UsageError(f"unknown layout {name!r}", hint="layouts: " + ", ".join(LAYOUTS))
    return LAYOUTS[name]
