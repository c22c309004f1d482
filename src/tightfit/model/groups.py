"""Weights of layers alike, counted once: a model of 90 layers has only a few kinds."""

from collections.abc import Iterable
from dataclasses import dataclass

from tightfit.model.layout import Rank, Weight, on_rank, pipeline_layers
from tightfit.model.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightGroup:
    """One weight for all layers that have its like, so that sums need not look at every layer."""

    weight: Weight
    layers: tuple[int, ...]
    """Empty for a weight outside the layers."""

    def on_rank(self, rank: Rank, num_layers: int) -> int:
        """How many of them the pipeline stage of a rank holds."""
        if not self.layers:
            return int(on_rank(self.weight, rank, num_layers))
        stages = rank.parallel.pipeline_parallel_size
        if stages == 1:
            return len(self.layers)
        stage = pipeline_layers(num_layers, stages, rank.pp_rank)
        return sum(layer in stage for layer in self.layers)


def grouped(spec: ModelSpec, weights: Iterable[Weight]) -> tuple[WeightGroup, ...]:
    """Weights of a model, those of layers alike together: same cut and same sizes, other names."""
    groups: dict[tuple[object, ...], tuple[Weight, list[int]]] = {}
    for weight in weights:
        where = weight.where
        key: tuple[object, ...] = (weight.name,)
        if isinstance(where, int):
            module, rows = f"{spec.names.layers}.{where}.", sum(p.rows for p in weight.parts)
            if weight.name.startswith(module):
                name, layer = weight.name.removeprefix(module), id(spec.layers[where])
                key = (layer, name, weight.dtype, weight.columns, rows)
        layers = groups.setdefault(key, (weight, []))[1]
        if isinstance(where, int):
            layers.append(where)
    return tuple(WeightGroup(weight=w, layers=tuple(layers)) for w, layers in groups.values())
