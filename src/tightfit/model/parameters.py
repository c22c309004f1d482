"""The parameters that an engine holds for a `ModelSpec`, with vLLM's fused names.

Sources are named as Hugging Face checkpoints name them. One function serves every decoder-only
family, because a `ModelSpec` says all that is different about them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from tightfit.errors import LayoutError
from tightfit.model.layout import (
    Axis,
    Cut,
    Parallel,
    Part,
    Rank,
    Stage,
    Weight,
    pipeline_layers,
)
from tightfit.model.spec import (
    Attention,
    BlockQuantization,
    DenseMLP,
    ModelSpec,
    MoE,
    NormStyle,
    QKNorm,
)
from tightfit.units import cdiv, round_up

VOCAB_PADDING = 64
"""vLLM's `DEFAULT_VOCAB_PADDING_SIZE`."""

NORMS = {
    NormStyle.PRE: ("input_layernorm", "post_attention_layernorm"),
    NormStyle.POST: ("post_attention_layernorm", "post_feedforward_layernorm"),
    NormStyle.SANDWICH: (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""The norms of a layer, in the order in which a forward pass applies them."""


@lru_cache(maxsize=8)
def parameters(spec: ModelSpec) -> tuple[Weight, ...]:
    """Every parameter, in the order of the model.

    A tied model has no `lm_head.weight`: its embedding serves both ends.
    """
    weights = list(_weights(spec))
    if spec.quantization is not None:
        weights = [w for weight in weights for w in _in_blocks(weight, spec.quantization)]
    return tuple(weights)


def parameter_count(spec: ModelSpec) -> int:
    """Elements of all parameters as checkpoints count them: no padding, and no scales."""
    return sum(
        max(weight.experts, 1) * sum(part.rows for part in weight.parts) * (weight.columns or 1)
        for weight in parameters(spec)
        if not weight.name.endswith("_scale_inv")
    )


def check_parallel(spec: ModelSpec, parallel: Parallel) -> None:
    """Refuse a layout that this model cannot be cut into, and name those that work.

    Raises:
        LayoutError: a size does not divide.
    """
    try:
        _try(spec, parallel)
    except LayoutError as error:
        works = [n for n in range(1, 65) if _works(spec, replace(parallel, tensor_parallel_size=n))]
        raise LayoutError(
            error.message,
            hint=error.hint or "tensor parallel sizes that work: " + ", ".join(map(str, works)),
        ) from None


def _works(spec: ModelSpec, parallel: Parallel) -> bool:
    try:
        _try(spec, parallel)
    except LayoutError:
        return False
    return True


def _try(spec: ModelSpec, parallel: Parallel) -> None:
    pipeline_layers(spec.num_layers, parallel.pipeline_parallel_size, 0)
    rank = Rank(parallel=parallel)
    for axis in axes(spec):
        axis.span(rank)
    if not parallel.uneven:
        _check_full_norms(spec, parallel.tensor_parallel_size)


def _check_full_norms(spec: ModelSpec, tensor_parallel_size: int) -> None:
    """vLLM gathers the keys of all ranks for a norm over all heads, and cannot with copies."""
    for attention in {layer.attention for layer in spec.layers}:
        kv_heads = attention.num_kv_heads
        if attention.qk_norm is QKNorm.FULL and tensor_parallel_size > kv_heads:
            raise LayoutError(
                f"tensor parallel size {tensor_parallel_size} is more than "
                f"num_key_value_heads = {kv_heads}, and vLLM cannot copy KV heads of "
                f"{spec.architecture}, which normalizes all keys together"
            )


def axes(spec: ModelSpec) -> tuple[Axis, ...]:
    """Everything that a tensor parallel layout has to divide."""
    found: dict[Axis, None] = {}
    for weight in parameters(spec):
        if weight.input_axis is not None:
            found[weight.input_axis] = None
        found |= {part.axis: None for part in weight.parts if part.axis is not None}
    return tuple(found)


def _weights(spec: ModelSpec) -> Iterator[Weight]:
    vocab = Axis(label="the padded vocabulary", units=round_up(spec.vocab_size, VOCAB_PADDING))

    def table(name: str, where: Stage) -> Weight:
        return Weight(
            name=name,
            parts=(Part(source=name, rows=spec.vocab_size, axis=vocab),),
            columns=spec.hidden_size,
            cut=Cut.OUTPUT,
            where=where,
        )

    tied = spec.tie_word_embeddings
    yield table("model.embed_tokens.weight", Stage.BOTH_ENDS if tied else Stage.FIRST)
    for i, layer in enumerate(spec.layers):
        prefix = f"model.layers.{i}"
        yield from _attention(spec, layer.attention, f"{prefix}.self_attn", i)
        if isinstance(layer.mlp, MoE):
            yield from _experts(spec, layer.mlp, f"{prefix}.{layer.mlp.module}", i)
        else:
            yield from _mlp(spec, layer.mlp, f"{prefix}.mlp", i)
        for norm in NORMS[spec.norm_style]:
            yield _vector(f"{prefix}.{norm}.weight", spec.hidden_size, i)
    yield _vector("model.norm.weight", spec.hidden_size, Stage.LAST)
    if not tied:
        yield table("lm_head.weight", Stage.LAST)


def _vector(name: str, size: int, where: int | Stage) -> Weight:
    return Weight(name=name, parts=(Part(source=name, rows=size),), where=where)


def head_axes(attention: Attention) -> tuple[Axis, Axis]:
    """How query heads and KV heads go to ranks; an element is one feature of a head."""
    kv_heads = attention.num_kv_heads
    queries = Axis(
        label="num_attention_heads",
        units=attention.num_heads,
        unit_rows=attention.head_dim,
        groups=kv_heads,
    )
    keys = Axis(
        label="num_key_value_heads",
        units=kv_heads,
        unit_rows=attention.head_dim,
        groups=kv_heads,
        replicated=True,
    )
    return queries, keys


def _attention(spec: ModelSpec, attention: Attention, prefix: str, i: int) -> Iterator[Weight]:
    queries, keys = head_axes(attention)
    parts = _stack(
        prefix,
        "qkv_proj" if spec.fused_in_checkpoint else None,
        (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)),
    )
    yield from _linear(
        f"{prefix}.qkv_proj",
        parts,
        columns=spec.hidden_size,
        cut=Cut.OUTPUT,
        bias=attention.qkv_bias,
        where=i,
    )
    yield from _linear(
        f"{prefix}.o_proj",
        lambda kind: (Part(source=f"{prefix}.o_proj.{kind}", rows=spec.hidden_size),),
        columns=queries.rows,
        cut=Cut.INPUT,
        input_axis=queries,
        bias=attention.output_bias,
        where=i,
    )
    if attention.qk_norm is not QKNorm.NONE:
        full = attention.qk_norm is QKNorm.FULL
        for name, axis in (("q_norm", queries), ("k_norm", keys)):
            size = axis.rows if full else attention.head_dim
            yield _vector(f"{prefix}.{name}.weight", size, i)


def _mlp(spec: ModelSpec, mlp: DenseMLP, prefix: str, i: int) -> Iterator[Weight]:
    inner = Axis(label="intermediate_size", units=mlp.intermediate_size)
    parts = _stack(
        prefix,
        "gate_up_proj" if spec.fused_in_checkpoint else None,
        (("gate_proj", inner), ("up_proj", inner)),
    )
    yield from _linear(
        f"{prefix}.gate_up_proj",
        parts,
        columns=spec.hidden_size,
        cut=Cut.OUTPUT,
        bias=mlp.bias,
        where=i,
    )
    yield from _linear(
        f"{prefix}.down_proj",
        lambda kind: (Part(source=f"{prefix}.down_proj.{kind}", rows=spec.hidden_size),),
        columns=inner.rows,
        cut=Cut.INPUT,
        input_axis=inner,
        bias=mlp.bias,
        where=i,
    )


def _experts(spec: ModelSpec, moe: MoE, prefix: str, i: int) -> Iterator[Weight]:
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


Parts = Callable[[str], tuple[Part, ...]]
"""The parts of a linear layer's `weight` or `bias`."""


def _stack(prefix: str, fused: str | None, members: tuple[tuple[str, Axis], ...]) -> Parts:
    """Members stacked along the output: each a tensor of its own, or rows of one fused tensor."""

    def parts(kind: str) -> tuple[Part, ...]:
        if fused is None:
            return tuple(
                Part(source=f"{prefix}.{name}.{kind}", rows=axis.rows, axis=axis)
                for name, axis in members
            )
        total = sum(axis.rows for _, axis in members)
        found: list[Part] = []
        for _, axis in members:
            first = sum(part.rows for part in found)
            source = f"{prefix}.{fused}.{kind}"
            found.append(
                Part(source=source, rows=axis.rows, axis=axis, first_row=first, source_rows=total)
            )
        return tuple(found)

    return parts


def _linear(
    name: str,
    parts: Parts,
    *,
    columns: int,
    cut: Cut,
    where: int,
    bias: bool,
    input_axis: Axis | None = None,
) -> Iterator[Weight]:
    """A weight and its bias; the bias of a row parallel layer is whole on every rank."""
    yield Weight(
        name=f"{name}.weight",
        parts=parts("weight"),
        columns=columns,
        cut=cut,
        input_axis=input_axis,
        where=where,
        linear=True,
    )
    if bias:
        bias_cut = Cut.OUTPUT if cut is Cut.OUTPUT else Cut.NONE
        yield Weight(name=f"{name}.bias", parts=parts("bias"), cut=bias_cut, where=where)


def _in_blocks(weight: Weight, scheme: BlockQuantization) -> Iterator[Weight]:
    """A linear weight as e4m3 with `weight_scale_inv`, float32, one per block."""
    modules = {part.source.removesuffix(".weight") for part in weight.parts}
    skipped = any(
        module == name or module.startswith(f"{name}.")
        for module in modules
        for name in scheme.ignored
    )
    if not weight.linear or skipped:
        yield weight
        return
    assert weight.columns is not None
    yield replace(weight, dtype="F8_E4M3")
    rows, columns = scheme.block_rows, scheme.block_columns
    yield replace(
        weight,
        name=f"{weight.name}_scale_inv",
        dtype="F32",
        parts=tuple(
            replace(
                part,
                source=f"{part.source}_scale_inv",
                rows=cdiv(part.rows, rows),
                axis=part.axis and part.axis.in_blocks(rows),
                first_row=part.first_row // rows,
                source_rows=cdiv(part.source_rows, rows),
            )
            for part in weight.parts
        ),
        columns=cdiv(weight.columns, columns),
        input_axis=weight.input_axis and weight.input_axis.in_blocks(columns),
    )
