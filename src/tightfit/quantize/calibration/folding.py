"""Scales of channels that move from activations to weights, and change nothing but rounding.

What comes before a linear layer is divided by them: the gain of a norm, or the rows of the layer
whose outputs reach it channel by channel, as those of v_proj reach o_proj, and those of up_proj
reach down_proj.
"""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.model.blocks.mlp import DenseMLP, MoE
from tightfit.model.layout import Weight
from tightfit.model.parameters import NORMS, plain_parameters
from tightfit.model.spec import ModelSpec, NormStyle


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """`consumers` are the modules whose inputs are divided, `others` further matrices that read the
    same: a router.

    The channels come from the gain of a `norm`, or from the rows of `producer` from `first_row` on;
    each of those feeds `repeats` heads of `head_dim` channels.
    """

    consumers: tuple[str, ...]
    others: tuple[str, ...] = ()
    norm: str | None = None
    unit_offset: bool = False
    producer: str = ""
    first_row: int = 0
    head_dim: int = 1
    repeats: int = 1

    def shared(self, values: Tensor) -> Tensor:
        """The mean of channels that have to have the same scale: `[producer's rows]`."""
        return values.view(-1, self.repeats, self.head_dim).mean(dim=1).flatten()

    def spread(self, scales: Tensor) -> Tensor:
        """Scales of producer's rows for all channels."""
        rows = scales.view(-1, 1, self.head_dim)
        return rows.expand(-1, self.repeats, -1).flatten()

    def alike(self, scales: Tensor) -> Tensor:
        """With the same scale for all channels that come from one row."""
        return scales if self.norm is not None else self.spread(self.shared(scales))

    def apply(
        self, parameters: MutableMapping[str, Tensor], scales: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, set[str]]:
        """Divide what comes before by `scales`, and multiply the consumers' columns.

        Args:
            parameters: of the layer, by name; changed in place.
            scales: float32, `[channels]`.
            dtype: in which changed norms will be stored.

        Returns:
            The scales as they are after rounding, and the names of what has changed.
        """
        changed = {f"{name}.weight" for name in (*self.consumers, *self.others)}
        if self.norm is not None:
            gain, offset = parameters[self.norm], float(self.unit_offset)
            old = gain.float() + offset
            stored = (old / scales - offset).to(dtype).float()
            usable = (old != 0) & (stored + offset != 0)
            gain.copy_(torch.where(usable, stored, gain))
            # What rounding has done to the norm is undone in the weights.
            scales = torch.where(usable, old / (stored + offset), 1.0)
            changed.add(self.norm)
        else:
            rows = self.shared(scales)
            stop = self.first_row + len(rows)
            for kind in ("weight", "bias"):
                name = f"{self.producer}.{kind}"
                if name in parameters:
                    part = parameters[name][self.first_row : stop]
                    part.div_(rows[:, None] if part.ndim > 1 else rows)
                    changed.add(name)
        for name in (*self.consumers, *self.others):
            parameters[f"{name}.weight"].mul_(scales)
        return scales, changed


def folds(spec: ModelSpec, index: int) -> Iterator[Fold]:
    """All that a layer allows, in the order of its computation.

    Those whose channels come from a producer's rows come after those that multiply its columns.
    """
    weights = {
        weight.name.removeprefix(f"{spec.names.layers}.{index}."): weight
        for weight in plain_parameters(spec)
        if weight.where == index
    }
    prefix = f"{spec.names.layers}.{index}"
    before_attention, before_mlp = _norms(spec)
    layer = spec.layers[index]
    attention, mlp = layer.attention, layer.mlp
    qkv, output = weights["self_attn.qkv_proj.weight"], weights["self_attn.o_proj.weight"]
    if before_attention is not None:
        norm = f"{prefix}.{before_attention}.weight"
        yield Fold(consumers=_modules(qkv), norm=norm, unit_offset=spec.norm_unit_offset)
    value = qkv.parts[-1]
    if not value.repeats and not value.run_rows:
        yield Fold(
            consumers=_modules(output),
            producer=value.source.removesuffix(".weight"),
            first_row=value.first_row,
            head_dim=attention.head_dim,
            repeats=attention.num_heads // attention.num_kv_heads,
        )
    yield from _mlp_folds(spec, weights, prefix, before_mlp, mlp)


def _mlp_folds(
    spec: ModelSpec,
    weights: dict[str, Weight],
    prefix: str,
    before: str | None,
    mlp: DenseMLP | MoE | None,
) -> Iterator[Fold]:
    assert mlp is not None
    module = mlp.module
    sparse = isinstance(mlp, MoE)
    first = weights[f"{module}.experts.w13_weight" if sparse else f"{module}.gate_up_proj.weight"]
    second = weights[f"{module}.experts.w2_weight" if sparse else f"{module}.down_proj.weight"]
    if before is not None:
        yield Fold(
            consumers=_modules(first),
            others=(f"{prefix}.{module}.{mlp.router}",) if isinstance(mlp, MoE) else (),
            norm=f"{prefix}.{before}.weight",
            unit_offset=spec.norm_unit_offset,
        )
    up = first.parts[-1]
    for expert in range(max(first.experts, 1)):
        yield Fold(
            consumers=(second.parts[0].source.format(expert=expert).removesuffix(".weight"),),
            producer=up.source.format(expert=expert).removesuffix(".weight"),
            first_row=up.first_row,
        )


def _norms(spec: ModelSpec) -> tuple[str | None, str | None]:
    """Those before attention and before the MLP."""
    match spec.norm_style:
        case NormStyle.PRE:
            first, second = NORMS[NormStyle.PRE]
            return first, second
        case NormStyle.SANDWICH:
            first, _, third, _ = NORMS[NormStyle.SANDWICH]
            return first, third
    return None, None


def _modules(weight: Weight) -> tuple[str, ...]:
    """All modules of a weight, in the order of experts."""
    return tuple(
        dict.fromkeys(
            part.source.format(expert=expert).removesuffix(".weight")
            for expert in range(max(weight.experts, 1))
            for part in weight.parts
        )
    )
