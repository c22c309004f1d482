"""Checkpoints of one model under other names than those it was published with.

transformers 5 keeps the experts of a layer in one tensor and has its decoder in
`model.language_model`, whatever the published files say, and writes files of either kind; tools of
the years between wrote mixtures. `aligned` finds the tensors of such files under the names that a
`ModelSpec` expects: a table of rules renames what it can, and experts or fused projections are
taken apart or put together. The rules are those of transformers' `conversion_mapping.py`, read
backwards, and of the `hf_to_vllm_mapper` of vLLM's models.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from tightfit.errors import CheckpointError, UnsupportedModelError
from tightfit.model.layout import Part, Weight
from tightfit.model.parameters import parameters
from tightfit.model.sources import Tensor, expected_sources, sources_of
from tightfit.model.spec import ModelSpec

_RULES = (
    (r"^(?:model\.)?language_model\.lm_head\.|^lm_head\.|^model\.lm_head\.", "{head}."),
    (r"^(?:language_model\.)?(?:model|transformer|backbone)\.(?:language_model\.)?", "{text}"),
    (r"^model\.language_model\.model\.|^language_model\.", "{text}"),
    (r"^(?=(?:embed_tokens|layers|norm)\.)", "{text}"),
    (r"^(?:model\.)?(?=visual\.)|^(?=vision_tower\.)", "model."),
    (r"^model\.(?!layers)", ""),
    (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"\.mlp\.", ".block_sparse_moe."),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.router\.weight$", ".gate.weight"),
    (r"\.router\.weight$", ".router.layer.weight"),
    (r"\.gate\.(?=(?:moe_statics\.)?e_score_correction_bias$)", "."),
    (r"\.self_attn\.sinks$", ".self_attn.attention_sink_bias"),
    (r"\.self_attn\.indexer\.([qk]_)", r".self_attn.index_\1"),
    (r"\.experts\.#\.w1\.", ".experts.#.gate_proj."),
    (r"\.experts\.#\.w2\.", ".experts.#.down_proj."),
    (r"\.experts\.#\.w3\.", ".experts.#.up_proj."),
    (r"\.experts\.#\.gate_proj\.", ".experts.#.w1."),
    (r"\.experts\.#\.down_proj\.", ".experts.#.w2."),
    (r"\.experts\.#\.up_proj\.", ".experts.#.w3."),
)
"""(regular expression, replacement) of names in which the numbers of layers and experts are `#`,
applied in this order in every combination: a result counts only if the model lacks that name."""

_NUMBER = re.compile(r"\b(layers?|blocks|experts|h)\.(\d+)(?=\.)")
_MOST_TEMPLATES = 1_000
"""No model has as many names that differ by more than numbers; damaged headers may."""
_EXPERTS = re.compile(r"(.*\.experts)\.(w13|w2)_(?:weight|(bias))(.*)")


class Aligned(NamedTuple):
    """Tensors under the names of a model, and one that has another name in its file."""

    tensors: Mapping[str, Tensor]
    alias: str | None


class _Made(NamedTuple):
    """A tensor that is part of another in the file, or is made of several."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def aligned(spec: ModelSpec, tensors: Mapping[str, Tensor], where: str) -> Aligned:
    """Find the tensors of a model among those of files that may name them otherwise.

    Tensors that no rule knows keep their names, for `check_sources` to judge.

    Args:
        spec: says the names and shapes that are expected.
        tensors: of the files.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: experts or a fused projection have another shape than the model's.
    """
    wanted = expected_sources(spec)
    whole = all(name in tensors or one.optional for name, one in wanted.items())
    stacked = (weight for weight in parameters(spec) if weight.stacked)
    if whole and not any(_is_turned(weight, tensors) for weight in stacked):
        return Aligned(tensors, None)
    lacking = [weight for weight in parameters(spec) if _lacks(weight, tensors)]
    others = {weight.name: tuple(_other_forms(weight)) for weight in lacking}
    targets = {name for name in wanted if name not in tensors}
    for forms in others.values():
        targets.update(name for form in forms for name in sources_of(form))
    found = _renamed(spec, tensors, wanted.keys(), targets)
    for weight in lacking:
        for form in (weight, *others[weight.name]):
            if made := _converted(weight, form, found, where):
                for name in sources_of(form):
                    found.pop(name)
                found |= made
                break
    alias = next((name for name in tensors if found.get(name) is not tensors[name]), None)
    return Aligned(tensors if alias is None else found, alias)


def require_own_names(spec: ModelSpec) -> None:
    """Refuse to read the weights of a checkpoint that was aligned.

    Raises:
        UnsupportedModelError: its tensors have other names than their sources.
    """
    if spec.alias is not None:
        raise UnsupportedModelError(
            f"{spec.architecture} is read under the names of published checkpoints, and this one "
            f"has other names, such as {spec.alias!r}",
            hint="plan it with `tightfit plan`; or load it with transformers 5 and "
            "save_pretrained() it, which writes the published names",
        )


def _renamed(
    spec: ModelSpec, tensors: Mapping[str, Tensor], known: Iterable[str], targets: set[str]
) -> dict[str, Tensor]:
    """The tensors, where names that nobody expects became targets that nothing else is."""
    text, dot, _ = spec.names.layers.rpartition(".")
    rules = [
        (re.compile(pattern), new.format(head=spec.names.head, text=text + dot))
        for pattern, new in _RULES
    ]
    known = set(known)
    templates: dict[str, tuple[str, ...]] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name
        if name not in known and name not in targets and "#" not in name:
            template = _NUMBER.sub(r"\1.#", name)
            if template not in templates and len(templates) < _MOST_TEMPLATES:
                templates[template] = _combined(template, rules)
            numbers = [number for _, number in _NUMBER.findall(name)]
            candidates = (_filled(one, numbers) for one in templates.get(template, ()))
            free = (one for one in candidates if one in targets and one not in tensors)
            new = next((one for one in free if one not in found), name)
        found[new] = tensor
    return found


def _combined(template: str, rules: list[tuple[re.Pattern[str], str]]) -> tuple[str, ...]:
    found = {template: None}
    for pattern, new in rules:
        found |= {pattern.sub(new, one, count=1): None for one in found}
    return tuple(one for one in found if one.count("#") == template.count("#"))


def _filled(template: str, numbers: list[str]) -> str:
    first, *rest = template.split("#")
    return first + "".join(map("".join, zip(numbers, rest, strict=True)))


def _lacks(weight: Weight, tensors: Mapping[str, Tensor]) -> bool:
    if weight.stacked and _is_turned(weight, tensors):
        return True
    first = weight.parts[0].source
    return (first.format(expert=0) if weight.experts else first) not in tensors


def _is_turned(weight: Weight, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has stacked experts as `[experts, columns, rows]` for rows, columns."""
    shape = weight.source_shape(weight.parts[0])
    tensor = tensors.get(weight.parts[0].source)
    return tensor is not None and tensor.shape != shape and _holds(tensor.shape, shape)


def _other_forms(weight: Weight) -> Iterator[Weight]:
    """The weight with other sources: stacked for separate, fused for not, and the reverse."""
    rows = sum(part.rows for part in weight.parts if not part.repeats)
    match = _EXPERTS.fullmatch(weight.name) if weight.experts else None
    if match is None:
        count = len({part.source for part in weight.parts})
        if count > 1 and not weight.experts:
            fused, shape = Part(source=weight.name, rows=rows), weight.stored_shape
            shape = None if shape is None else (count * shape[0], *shape[1:])
            yield replace(weight, parts=(fused,), stored_shape=shape)
        return
    module, kind, bias, tail = match.groups()
    pair = ("gate_proj", "up_proj") if len(weight.parts) > 1 else ("up_proj",)
    stems = pair if kind == "w13" else ("down_proj",)
    stem = "gate_up_proj" if len(stems) > 1 else stems[0]
    plain = replace(weight, transposed=False, stored_shape=None)
    stacked = Part(source=f"{module}.{stem}{'_bias' if bias else ''}{tail}", rows=rows)
    yield replace(plain, parts=(stacked,), stacked=True)
    ending = "bias" if bias else "weight"
    yield replace(
        plain,
        parts=tuple(
            Part(source=f"{module}.{{expert}}.{one}.{ending}{tail}", rows=rows // len(stems))
            for one in stems
        ),
        stacked=False,
    )


def _converted(
    weight: Weight, form: Weight, tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The tensors of a weight from those of one of its forms; nothing if these are not there."""
    shapes = sources_of(form)
    if not all(name in tensors for name in shapes):
        return {}
    if form is weight and not _is_turned(weight, tensors):
        return {}
    for name, shape in shapes.items():
        if not _holds(tensors[name].shape, shape):
            called = getattr(tensors[name], "name", name)
            raise CheckpointError(
                f"{where}: tensor {called!r} has the shape {list(tensors[name].shape)}, and "
                f"config.json says {list(shape)}",
                hint="config.json and the weights belong to different models",
            )
    first = tensors[next(iter(shapes))]
    wanted = sources_of(weight)
    each = sum(tensors[name].nbytes for name in shapes) / sum(map(prod, wanted.values()))
    called = getattr(first, "name", next(iter(shapes)))
    return {
        name: _Made(called, first.dtype, shape, round(each * prod(shape)))
        for name, shape in wanted.items()
    }


def _holds(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether these are the same sizes but for the order of the last two, and for ones."""
    short, other = ([n for n in one if n != 1] for one in (shape, wanted))
    return short[:-2] == other[:-2] and sorted(short[-2:]) == sorted(other[-2:])
