"""What part of a model a matrix belongs to: its layer, and its kind."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.linear import norm
from tightfit.model.blocks.mlp import MoE
from tightfit.model.parameters import layer_norms
from tightfit.model.quantization.recipe import split_experts
from tightfit.model.quantization.written import matrices
from tightfit.model.sources import sources_of
from tightfit.model.spec import Layer, ModelSpec

ATTENTION, MLP, EXPERTS, SHARED = "attention", "mlp", "experts", "shared experts"
EXTRAS, TOWERS, HEAD = "extras", "towers", "head"
KINDS = (ATTENTION, MLP, EXPERTS, SHARED, EXTRAS, TOWERS, HEAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """One of `KINDS`, and the decoder layer (None outside of them)."""

    kind: str
    layer: int | None


def places(spec: ModelSpec) -> Mapping[str, Where]:
    """Where each matrix is that can be quantized, by module; every expert has its own."""
    kinds = {name: kind for number in range(spec.num_layers) for name, kind in _kinds(spec, number)}
    found = {}
    for weight in matrices(spec):
        layer = weight.where if isinstance(weight.where, int) else None
        kind = EXPERTS if weight.experts else kinds.get(weight.name, TOWERS)
        for part in split_experts(weight).parts:
            for expert in range(max(weight.experts, 1)):
                module = part.source.format(expert=expert).removesuffix(".weight")
                outside = HEAD if module == spec.names.head else kind
                found[module] = Where(kind=outside, layer=layer)
    return found


def layer_kinds(spec: ModelSpec, number: int) -> Mapping[str, str]:
    """The kind of each tensor of a decoder layer, by its name; norms are of what comes after them.

    Or before them, where a layer normalizes what it adds.
    """
    layer = spec.layers[number]
    place = _place(spec, number)
    found: dict[str, str] = {}
    for block, kind in _blocks(layer):
        for weight in block.weights(place):
            # A router belongs to its experts.
            routed = isinstance(block, MoE) and (weight.experts or not weight.linear)
            found |= dict.fromkeys(sources_of(weight), EXPERTS if routed else kind)
    norms = layer_norms(spec, layer)
    rest = next((kind for kind in found.values() if kind != ATTENTION), ATTENTION)
    for at, name in enumerate(norms):
        kind = ATTENTION if at < len(norms) // 2 else rest
        for weight in norm(f"{place.prefix}.{name}", spec.hidden_size, number, bias=spec.norm_bias):
            found |= dict.fromkeys(sources_of(weight), kind)
    return found


def _kinds(spec: ModelSpec, number: int) -> Iterator[tuple[str, str]]:
    """Names of an engine's weights in a layer, each with its kind."""
    for block, kind in _blocks(spec.layers[number]):
        for weight in block.weights(_place(spec, number)):
            yield weight.name, kind


def _place(spec: ModelSpec, number: int) -> Place:
    prefix = f"{spec.names.layers}.{number}"
    return Place(prefix=prefix, where=number, hidden_size=spec.hidden_size)


def _blocks(layer: Layer) -> Iterator[tuple[Block, str]]:
    for mixer in layer.mixers:
        yield mixer, ATTENTION
    if layer.mlp is not None:
        yield layer.mlp, SHARED if isinstance(layer.mlp, MoE) else MLP
    for extra in layer.extras:
        yield extra, EXTRAS
