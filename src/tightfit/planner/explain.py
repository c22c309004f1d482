"""How a component was computed: its formula with the numbers in it, and for weights their parts."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tightfit.errors import UsageError
from tightfit.model.layout import Parallel, Rank
from tightfit.model.spec import ModelSpec
from tightfit.planner.plan import Component, Plan
from tightfit.planner.weights import held
from tightfit.units import dtype_bytes

_PARTS = (
    ("vision and audio towers", r"vis(ion|ual)|audio|image|mm_projector|multi_modal|aligner|tower"),
    (
        "embedding",
        r"(^|\.)(embed\w*|wte|wpe|word_emb\w*|tok_emb\w*)\.",
    ),
    ("head", r"(^|\.)(lm_head|output_layer)\.|^(model\.)?(output|head)\.|(^|\.)hc_head"),
    ("norms", r"norm"),
    ("experts", r"experts"),
    ("routers", r"\.(gate|router)\."),
    (
        "state space, linear attention and convolutions",
        r"mamba|ssm|linear_attn|\.conv\.|mixer\.(in_proj|conv1d|out_proj|x_proj|dt_|A|D)",
    ),
    (
        "MLP",
        r"mlp|feed_forward|block_sparse_moe|share_expert|ffn|\.fc[12]\.|\d\.linear\."
        r"|mixer\.(up|down|gate)\w*proj",
    ),
    ("attention", r"attn|attention|indexer|mixer"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The weights of one kind and dtype on one rank."""

    name: str
    dtype: str
    parameters: int
    """Elements, padding and copies included."""
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One component, and the ranks of which it is true; no ranks means the host."""

    component: Component
    ranks: tuple[int, ...]
    parts: tuple[Part, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The explanation in schema 1."""
        return {
            **self.component.to_json(),
            "ranks": list(self.ranks),
            "parts": [asdict(part) for part in self.parts],
        }


def explain(plan: Plan, spec: ModelSpec, parallel: Parallel, name: str) -> list[Explanation]:
    """Explain a component of that name, on the ranks and on the host; `all` explains each.

    Args:
        plan: whose components are explained.
        spec: the model as the engine builds it (`Engine.adapt`).
        parallel: the layout of the plan.
        name: of a component, or `all`.

    Raises:
        UsageError: the plan has no such component.
    """
    found: list[Explanation] = []
    for known in dict.fromkeys(c.name for rank in plan.ranks for c in rank.components):
        if name in (known, "all"):
            found += _on_ranks(plan, spec, parallel, known)
    found += [
        Explanation(component=one, ranks=()) for one in plan.host if name in (one.name, "all")
    ]
    if not found:
        names = [c.name for c in plan.ranks[0].components] + [c.name for c in plan.host]
        raise UsageError(
            f"the plan has no component {name!r}",
            hint="it has " + ", ".join(dict.fromkeys([*names, "all"])),
        )
    return found


def _on_ranks(plan: Plan, spec: ModelSpec, parallel: Parallel, name: str) -> list[Explanation]:
    """One explanation per formula."""
    groups: dict[str, list[tuple[int, Component]]] = {}
    for rank in plan.ranks:
        for component in rank.components:
            if component.name == name:
                groups.setdefault(component.formula, []).append((rank.rank, component))
    ranks = {rank.rank: rank for rank in parallel.ranks()}
    return [
        Explanation(
            component=members[0][1],
            ranks=tuple(number for number, _ in members),
            parts=weight_parts(spec, ranks[members[0][0]], plan.options.dtype.value)
            if name == "weights" and members[0][0] in ranks
            else (),
        )
        for members in groups.values()
    ]


def weight_parts(spec: ModelSpec, rank: Rank, dtype: str) -> tuple[Part, ...]:
    """The weights of a rank by what they are for and by dtype, the largest first."""
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for weight in held(spec, rank):
        if weight.dropped:
            continue
        key = (_kind(weight.name), weight.held_dtype(dtype))
        elements = weight.census(rank).elements
        count, nbytes = totals.get(key, (0, 0))
        totals[key] = (count + elements, nbytes + dtype_bytes(key[1], elements))
    parts = [
        Part(name=name, dtype=of, parameters=count, nbytes=nbytes)
        for (name, of), (count, nbytes) in totals.items()
    ]
    return tuple(sorted(parts, key=lambda part: -part.nbytes))


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _PARTS if re.search(pattern, name)), "other")


def explanation_lines(found: Sequence[Explanation]) -> list[str]:
    """The explanations as text: one line each, and one per part of the weights."""
    lines: list[str] = []
    alone = {one.component.name: 0 for one in found}
    for one in found:
        alone[one.component.name] += 1
    for one in found:
        where = " of the host" if not one.ranks else ""
        if one.ranks and alone[one.component.name] > 1:
            where = f" on rank {', '.join(map(str, one.ranks))}"
        lines.append(f"{one.component.name}{where}: {one.component.formula}")
        whole = max(sum(part.nbytes for part in one.parts), 1)
        lines += [
            f"  {part.name} in {part.dtype}: {part.parameters:,} parameters, "
            f"{part.nbytes:,} bytes ({part.nbytes / whole:.1%})"
            for part in one.parts
        ]
    return lines
