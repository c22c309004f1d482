"""What part of a model a matrix belongs to: its layer, and its kind."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.mlp import MoE
from tightfit.model.layout import Weight
from tightfit.model.quantization.recipe import split_experts
from tightfit.model.quantization.written import matrices, module_name
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
    """Where each matrix is that can be quantized, by module; `experts.0` stands for all."""
    kinds = {
        name: kind for i, layer in enumerate(spec.layers) for name, kind in _of(spec, i, layer)
    }
    found = {}
    for weight in matrices(spec):
        for part in split_experts(weight).parts:
            module = module_name(part.source)
            layer = weight.where if isinstance(weight.where, int) else None
            outside = HEAD if module == spec.names.head else TOWERS
            found[module] = Where(kind=kinds.get(weight.name, outside), layer=layer)
    return found


def first_expert(module: str) -> str:
    """The module that stands for all experts: `mlp.experts.7.up_proj` -> `mlp.experts.0.up_proj`."""
    parts = module.split(".")
    for at in range(1, len(parts)):
        if parts[at].isdigit() and parts[at - 1].endswith("experts"):
            parts[at] = "0"
    return ".".join(parts)


def _of(spec: ModelSpec, number: int, layer: Layer) -> Iterator[tuple[str, str]]:
    """Names of an engine's weights in a layer, each with its kind."""
    place = Place(
        prefix=f"{spec.names.layers}.{number}", where=number, hidden_size=spec.hidden_size
    )

    def named(block: Block, kind: str) -> Iterator[tuple[str, str]]:
        return ((weight.name, _kind(weight, kind)) for weight in block.weights(place))

    for mixer in layer.mixers:
        yield from named(mixer, ATTENTION)
    if layer.mlp is not None:
        yield from named(layer.mlp, SHARED if isinstance(layer.mlp, MoE) else MLP)
    for extra in layer.extras:
        yield from named(extra, EXTRAS)


def _kind(weight: Weight, kind: str) -> str:
    return EXPERTS if weight.experts else kind
