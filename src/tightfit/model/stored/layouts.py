"""The naming of each engine version that rank files can be written for.

Between versions vLLM's names changed with its modules: float32 scalars of attention layers are
stored since 0.14, the modules of experts are those of today since 0.25, and files of pipeline
stages have names of their own since 0.32 (`model_loader/sharded_state_loader.py`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tightfit.errors import UnsupportedModelError, UsageError
from tightfit.model.parallel import Parallel
from tightfit.model.spec import ModelSpec
from tightfit.model.stored.names import FamilyNames, family_names
from tightfit.model.stored.older import names_0_8, names_0_14, names_0_25
from tightfit.model.stored.sglang import check_sglang, sglang_names

Version = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayout:
    """The naming of one range of engine versions.

    `uneven` layouts need an engine that accepts them. Nobody has loaded files of `derived` ones:
    their names are those of the engine's modules, built without weights or kernels.
    """

    name: str
    uneven: bool = False
    family: Callable[[str], FamilyNames]
    """The names of an architecture; raises UnsupportedModelError if they are not known."""
    versions: tuple[Version, Version] | None = None
    """First and last version of vLLM that loads it."""
    stages: bool = True
    """Files of pipeline stages have names of their own."""
    derived: bool = False
    refuse: Callable[[ModelSpec], None] | None = None
    """Raises UnsupportedModelError for variants that the engine builds otherwise."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of the layout should know."""
        if not self.derived:
            return ()
        engine = "SGLang 0.5"
        if self.versions is not None:
            first, last = (".".join(map(str, version)) for version in self.versions)
            engine = f"vLLM {first} to {last}"
        return (
            f"layout {self.name} is for {engine}; its names were read in the source, and no such "
            "engine has loaded files of tightfit: try one before you rely on it",
        )

    def check(self, spec: ModelSpec, parallel: Parallel) -> None:
        """Refuse what engines of the layout cannot load.

        Raises:
            UnsupportedModelError: a family whose names are not known, or quantization.
            UsageError: pipeline stages without names of their own, or experts that are dealt.
        """
        self.family(spec.architecture)
        if self.refuse is not None:
            self.refuse(spec)
        if self.derived and parallel.expert_parallel:
            raise UsageError(
                f"how engines of layout {self.name} deal out experts is not known",
                hint=f"leave out --enable-expert-parallel, or use --layout {DEFAULT_LAYOUT}",
            )
        if parallel.pipeline_parallel_size > 1 and not self.stages:
            raise UsageError(
                f"engines of layout {self.name} name the files of all pipeline stages alike",
                hint="leave out --pipeline-parallel-size, or shard for vLLM 0.32 or newer",
            )
        if self.derived and spec.quantization is not None:
            raise UnsupportedModelError(
                f"layout {self.name} has no quantized layers",
                hint=f"shard for vLLM 0.32 or newer: --layout {DEFAULT_LAYOUT}",
            )


DEFAULT_LAYOUT = "vllm-0.32"
_VLLM = (
    StoredLayout(name=DEFAULT_LAYOUT, family=family_names, versions=((0, 32), (0, 33))),
    StoredLayout(
        name="vllm-0.25",
        family=names_0_25,
        versions=((0, 25), (0, 31)),
        stages=False,
        derived=True,
    ),
    StoredLayout(
        name="vllm-0.14",
        family=names_0_14,
        versions=((0, 14), (0, 24)),
        stages=False,
        derived=True,
    ),
    StoredLayout(
        name="vllm-0.8", family=names_0_8, versions=((0, 8), (0, 13)), stages=False, derived=True
    ),
)
_SGLANG = StoredLayout(
    name="sglang-0.5", family=sglang_names, stages=False, derived=True, refuse=check_sglang
)
LAYOUTS: Mapping[str, StoredLayout] = {
    DEFAULT_LAYOUT: _VLLM[0],
    "builtin": replace(_VLLM[0], name="builtin", uneven=True, versions=None),
    **{layout.name: layout for layout in (*_VLLM[1:], _SGLANG)},
}
"""`builtin` has vLLM's names, but heads and widths that do not divide are dealt unevenly."""

_SGLANG_RELEASE = re.compile(r"sglang-0\.5\.\w{1,40}")
_RELEASE = re.compile(r"vllm-(\d{1,4})\.(\d{1,4})(?:\.[\w.+]{1,40})?")


def stored_layout(name: str) -> StoredLayout:
    """Find a layout by its name or by a version that it serves, such as `vllm-0.11.0`.

    Raises:
        UsageError: no such layout.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    if _SGLANG_RELEASE.fullmatch(name):
        return _SGLANG
    if match := _RELEASE.fullmatch(name):
        version = int(match[1]), int(match[2])
        for layout in _VLLM:
            if layout.versions and layout.versions[0] <= version <= layout.versions[1]:
                return layout
        first, last = _VLLM[-1].versions, _VLLM[0].versions
        assert first is not None
        assert last is not None
        raise UsageError(
            f"no layout serves {name}",
            hint=f"known are vLLM {first[0][0]}.{first[0][1]} to {last[1][0]}.{last[1][1]}",
        )
    raise UsageError(
        f"unknown layout {name!r}",
        hint="layouts: " + ", ".join(LAYOUTS) + "; or a version, such as vllm-0.25.1",
    )
