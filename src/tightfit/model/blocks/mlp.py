"""Gated MLPs: one for all tokens, or a router and experts."""

from collections.abc import Iterator

from tightfit.model.blocks.linear import linear, stack
from tightfit.model.layout import Axis, Cut, Part, Weight
from tightfit.model.spec import DenseMLP, ModelSpec, MoE


def dense_weights(spec: ModelSpec, mlp: DenseMLP, prefix: str, i: int) -> Iterator[Weight]:
    """The gated MLP of layer `i`, whose module is called `prefix`."""
    inner = Axis(label="intermediate_size", units=mlp.intermediate_size)
    parts = stack(
        prefix,
        "gate_up_proj" if spec.fused_in_checkpoint else None,
        (("gate_proj", inner), ("up_proj", inner)),
    )
    yield from linear(
        f"{prefix}.gate_up_proj",
        parts,
        columns=spec.hidden_size,
        cut=Cut.OUTPUT,
        bias=mlp.bias,
        where=i,
    )
    yield from linear(
        f"{prefix}.down_proj",
        lambda kind: (Part(source=f"{prefix}.down_proj.{kind}", rows=spec.hidden_size),),
        columns=inner.rows,
        cut=Cut.INPUT,
        input_axis=inner,
        bias=mlp.bias,
        where=i,
    )


def expert_weights(spec: ModelSpec, moe: MoE, prefix: str, i: int) -> Iterator[Weight]:
    """Router and experts of layer `i`; gate and up of all experts are one tensor (vLLM's w13)."""
    inner = Axis(label="moe_intermediate_size", units=moe.intermediate_size)
    gate, up, down = (f"{prefix}.experts.{{expert}}.{name}.weight" for name in moe.gate_up_down)
    router = f"{prefix}.gate.weight"
    yield Weight(
        name=router,
        parts=(Part(source=router, rows=moe.num_experts),),
        columns=spec.hidden_size,
        where=i,
    )
    yield Weight(
        name=f"{prefix}.experts.w13_weight",
        parts=tuple(Part(source=name, rows=inner.rows, axis=inner) for name in (gate, up)),
        columns=spec.hidden_size,
        cut=Cut.OUTPUT,
        experts=moe.num_experts,
        where=i,
        linear=True,
    )
    yield Weight(
        name=f"{prefix}.experts.w2_weight",
        parts=(Part(source=down, rows=spec.hidden_size),),
        columns=inner.rows,
        cut=Cut.INPUT,
        input_axis=inner,
        experts=moe.num_experts,
        where=i,
        linear=True,
    )
