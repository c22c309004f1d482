"""The bytes of a rank's weights, exactly, from the shapes that `model` gives."""

from functools import lru_cache
from math import prod

from tightfit.model.groups import WeightGroup, grouped
from tightfit.model.layout import Rank, Weight, on_rank
from tightfit.model.parameters import loaded_parameters, parameter_count, parameters
from tightfit.model.spec import ModelSpec
from tightfit.planner.plan import Component
from tightfit.units import dtype_bytes


def weights_component(spec: ModelSpec, rank: Rank, dtype: str) -> Component:
    """Bytes of the parameters that a rank holds when the engine computes in `dtype`.

    `detail` says how much of it is padding, how much a lower rank holds as well, and what was
    loaded beside it and dropped.

    Raises:
        LayoutError: the model cannot be cut that way.
    """
    total = padding = copies = dropped = 0
    for group in _groups(spec):
        census, count = group.weight.census(rank), group.on_rank(rank, spec.num_layers)
        size = dtype_bytes(group.weight.held_dtype(dtype)) * count
        if group.weight.dropped:
            dropped += census.elements * size
            continue
        total += census.elements * size
        padding += census.padding * size
        copies += census.copies * size
    ranks = rank.parallel.world_size
    formula = f"{_count(spec):,} parameters in {dtype}"
    if spec.quantization is not None:
        formula += f" and {spec.quantization.name}"
    if ranks > 1:
        formula += f", cut for {ranks} ranks"
    formula += f": {total:,} bytes"
    if padding or copies:
        formula += f", {padding:,} of them padding and {copies:,} copies of a lower rank's"
    detail = {"padding_bytes": padding, "copied_bytes": copies}
    if dropped:
        formula += f"; {dropped:,} more are loaded, and dropped because kernels do not need them"
        detail["dropped_bytes"] = dropped
    return Component(
        name="weights", planned_bytes=total, origin="exact", formula=formula, detail=detail
    )


def offloadable(spec: ModelSpec, rank: Rank, dtype: str, limit_bytes: int) -> int:
    """Bytes of the layers' parameters, in their order, up to the one that reaches the limit."""
    moved = 0
    if limit_bytes <= 0:
        return moved
    for weight in held(spec, rank):
        if isinstance(weight.where, int):
            moved += dtype_bytes(weight.held_dtype(dtype), prod(weight.rank_shape(rank)))
            if moved >= limit_bytes:
                break
    return moved


@lru_cache(maxsize=8)
def _groups(spec: ModelSpec) -> tuple[WeightGroup, ...]:
    return grouped(spec, loaded_parameters(spec))


_count = lru_cache(maxsize=8)(parameter_count)


@lru_cache(maxsize=64)
def held(spec: ModelSpec, rank: Rank) -> tuple[Weight, ...]:
    """The weights of a rank's pipeline stage."""
    weights = loaded_parameters(spec)
    return tuple(weight for weight in weights if on_rank(weight, rank, spec.num_layers))


def checkpoint_bytes(spec: ModelSpec) -> int:
    """Bytes of all tensors that a checkpoint of this model holds, in the config's dtype."""
    found: dict[str, int] = {}
    for weight in parameters(spec):
        each = weight.experts if weight.experts and not weight.stacked else 1
        for part in weight.parts:
            elements = prod(weight.source_shape(part))
            found[part.source] = each * dtype_bytes(weight.dtype or spec.dtype, elements)
    return sum(found.values())
