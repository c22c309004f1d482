"""MLPs: one for all tokens, or a router and experts."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tightfit.model.blocks.base import Block, Place
from tightfit.model.blocks.linear import linear, stack, vector
from tightfit.model.layout import Axis, Cut, Part, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLP(Block):
    """A gated MLP, `down(activation(gate(x)) * up(x))`, or without the gate where it has none."""

    intermediate_size: int
    activation: str
    bias: bool = False
    gated: bool = True
    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: str | None = None
    """The checkpoint's name of one tensor that holds gate and up: Phi-3."""
    transposed: bool = False
    """Stored as `[in, out]`: GPT-2's Conv1D."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """`gate_up_proj` (or `up_proj`) and `down_proj`."""
        at = place.inside(self.module)
        inner = Axis(label="intermediate_size", units=self.intermediate_size)
        members = ((self.gate, inner), (self.up, inner)) if self.gated else ((self.up, inner),)
        yield from linear(
            f"{at.prefix}.gate_up_proj" if self.gated else f"{at.prefix}.{self.up}",
            stack(at.prefix, self.fused, members),
            columns=place.hidden_size,
            cut=Cut.OUTPUT,
            bias=self.bias,
            where=place.where,
            transposed=self.transposed,
        )
        yield from linear(
            f"{at.prefix}.{'down_proj' if self.gated else self.down}",
            lambda kind: (Part(source=f"{at.prefix}.{self.down}.{kind}", rows=place.hidden_size),),
            columns=inner.rows,
            cut=Cut.INPUT,
            input_axis=inner,
            bias=self.bias,
            where=place.where,
            transposed=self.transposed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """What a checkpoint calls the tensors of experts, inside the MoE's module.

    With `stacked` one tensor holds all experts, `[experts, rows, columns]` or, if `transposed`,
    `[experts, columns, rows]`, and `gate_up` holds both; otherwise every expert has its own, and
    `{expert}` stands for its number.
    """

    gate: str = "experts.{expert}.gate_proj.weight"
    up: str = "experts.{expert}.up_proj.weight"
    down: str = "experts.{expert}.down_proj.weight"
    gate_up: str | None = None
    stacked: bool = False
    transposed: bool = False
    alternating: bool = False
    """Rows of gate and up alternate, for an engine as well: gpt-oss."""
    flat: bool = False
    """Stacked, but as `[experts * intermediate_size, columns]`, down too: DBRX."""
    gate_up_bias: str | None = None
    """Name of the stacked biases of gate and up; None where experts have none."""
    down_bias: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How the scores of a router choose experts, and weigh their outputs.

    Of several `groups` of experts only those of the best `top_groups` are chosen from. A group is
    as good as its best expert (DeepSeek V2), or as its best two where a bias corrects the scores
    (V3).
    """

    sigmoid: bool = False
    """Scores are sigmoids of each logit, not a softmax of all."""
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    """What the outputs of the chosen experts are multiplied by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE(Block):
    """A router and experts, of which every token uses `top_k`, and experts that all tokens use."""

    num_experts: int
    top_k: int
    intermediate_size: int
    activation: str
    renormalize: bool
    """Whether the weights of the chosen experts are made to sum to one."""
    routing: Routing = Routing()
    module: str = "mlp"
    """The name of the module inside a layer: `mlp` or `block_sparse_moe`."""
    names: ExpertNames = ExpertNames()
    gated: bool = True
    router: str = "gate"
    router_bias: bool = False
    router_dtype: str | None = None
    correction_bias: str | None = None
    """Name of the bias that only decides who is chosen, float32: DeepSeek-V3."""
    correction_dtype: str | None = "F32"
    correction_shape: tuple[int, ...] | None = None
    """Of the bias in the checkpoint, where it is not a vector: Ernie 4.5."""
    shared: DenseMLP | None = None
    """An MLP for all tokens, whose module is inside that of the MoE."""
    shared_gate: str | None = None
    """Name of the one row that gates the shared MLP: Qwen2-MoE."""
    latent_size: int | None = None
    """Width at which routed experts work, where it is not the hidden size: Nemotron 3 Super."""
    own_kernels: bool = False
    """Engines compute these experts in MXFP4 with kernels made for them: gpt-oss."""
    zero_experts: int = 0
    """Choices of the router that are no experts, but give a token back as it is: LongCat-Flash."""
    smallest_share: int = 0
    """vLLM fills narrower shares of an expert with zeros up to this: Kimi Linear, Kimi-K3."""

    def weights(self, place: Place) -> Iterator[Weight]:
        """Router and experts; gate and up of all experts are one tensor (vLLM's w13)."""
        at, choices = place.inside(self.module), self.num_experts + self.zero_experts
        router = f"{at.prefix}.{self.router}"
        yield Weight(
            name=f"{router}.weight",
            parts=(Part(source=f"{router}.weight", rows=choices),),
            columns=place.hidden_size,
            where=place.where,
            dtype=self.router_dtype,
        )
        if self.router_bias:
            yield vector(f"{router}.bias", choices, place.where, self.router_dtype)
        if self.correction_bias is not None:
            name = f"{at.prefix}.{self.correction_bias}"
            bias = vector(name, choices, place.where, self.correction_dtype)
            yield replace(bias, stored_shape=self.correction_shape)
        yield from self._experts(at)
        if self.shared is not None:
            yield from self.shared.weights(at)
        if self.shared_gate is not None:
            name = f"{at.prefix}.{self.shared_gate}.weight"
            yield Weight(
                name=name,
                parts=(Part(source=name, rows=1),),
                columns=place.hidden_size,
                where=place.where,
            )

    def _experts(self, at: Place) -> Iterator[Weight]:
        inner = Axis(
            label="moe_intermediate_size",
            units=self.intermediate_size,
            at_least=self.smallest_share,
        )
        width = self.latent_size or at.hidden_size
        names = self.names
        stored = (self.num_experts * inner.rows, width) if names.flat else None
        yield Weight(
            name=f"{at.prefix}.experts.w13_weight",
            parts=self._gate_up(at.prefix, inner),
            columns=width,
            cut=Cut.OUTPUT,
            experts=self.num_experts,
            stacked=names.stacked,
            transposed=names.transposed,
            stored_shape=stored,
            where=at.where,
            linear=True,
        )
        if names.gate_up_bias is not None:
            rows = 2 * inner.rows if self.gated else inner.rows
            both = Axis(label=inner.label, units=inner.units, unit_rows=rows // inner.units)
            name = f"{at.prefix}.{names.gate_up_bias}"
            yield Weight(
                name=f"{at.prefix}.experts.w13_bias",
                parts=(Part(source=name, rows=rows, axis=both),),
                cut=Cut.OUTPUT,
                experts=self.num_experts,
                stacked=names.stacked,
                where=at.where,
            )
        yield Weight(
            name=f"{at.prefix}.experts.w2_weight",
            parts=(Part(source=f"{at.prefix}.{names.down}", rows=width),),
            columns=inner.rows,
            cut=Cut.INPUT,
            input_axis=inner,
            experts=self.num_experts,
            stacked=names.stacked,
            transposed=names.transposed,
            stored_shape=stored,
            where=at.where,
            linear=True,
        )
        if names.down_bias is not None:
            yield Weight(
                name=f"{at.prefix}.experts.w2_bias",
                parts=(Part(source=f"{at.prefix}.{names.down_bias}", rows=width),),
                experts=self.num_experts,
                stacked=names.stacked,
                where=at.where,
                added_once=True,
            )

    def _gate_up(self, prefix: str, inner: Axis) -> tuple[Part, ...]:
        names = self.names
        if not self.gated:
            return (Part(source=f"{prefix}.{names.up}", rows=inner.rows, axis=inner),)
        if names.gate_up is None:
            return tuple(
                Part(source=f"{prefix}.{name}", rows=inner.rows, axis=inner)
                for name in (names.gate, names.up)
            )
        source = f"{prefix}.{names.gate_up}"
        if names.alternating:
            both = replace(inner, unit_rows=2)
            return (Part(source=source, rows=both.rows, axis=both),)
        return tuple(
            Part(source=source, rows=inner.rows, axis=inner, first_row=first, source_rows=total)
            for total in (2 * inner.rows,)
            for first in (0, inner.rows)
        )
