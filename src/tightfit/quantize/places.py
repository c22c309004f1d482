"""What part of a model a matrix belongs to: its layer, and its kind."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.mlp import MoE
from tightfit.model.quantization.recipe import split_experts
from tightfit.model.quantization.written import matrices
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
    kinds = {
        name: kind
        for number, layer in enumerate(spec.layers)
        for name, kind in _kinds(spec, number, layer)
    }
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


def _kinds(spec: ModelSpec, number: int, layer: Layer) -> Iterator[tuple[str, str]]:
    """Names of an engine's weights in a layer, each with its kind."""
    prefix = f"{spec.names.layers}.{number}"
    place = Place(prefix=prefix, where=number, hidden_size=spec.hidden_size)
    blocks: list[tuple[Block, str]] = [(mixer, ATTENTION) for mixer in layer.mixers]
    if layer.mlp is not None:
        blocks.append((layer.mlp, SHARED if isinstance(layer.mlp, MoE) else MLP))
    blocks += [(extra, EXTRAS) for extra in layer.extras]
    for block, kind in blocks:
        for weight in block.weights(place):
            yield weight.name, kind
