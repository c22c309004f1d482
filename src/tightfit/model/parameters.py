"""The parameters that an engine holds for a `ModelSpec`, with vLLM's fused names.

Sources are named as Hugging Face checkpoints name them. One function serves every decoder-only
family, because a `ModelSpec` says all that is different about them.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from tightfit.errors import LayoutError
from tightfit.model.blocks.attention import Attention, QKNorm
from tightfit.model.blocks.base import Place
from tightfit.model.blocks.linear import norm
from tightfit.model.layout import (
    Axis,
    Cut,
    Parallel,
    Part,
    Rank,
    Stage,
    Weight,
    on_rank,
    pipeline_layers,
)
from tightfit.model.spec import Layer, ModelSpec, NormStyle
from tightfit.units import round_up

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
    """What a checkpoint holds: every parameter, in the order of the model.

    A tied model has no `lm_head.weight`: its embedding serves both ends.
    """
    if spec.quantization is None:
        return plain_parameters(spec)
    return tuple(w for weight in plain_parameters(spec) for w in spec.quantization.apply(weight))


@lru_cache(maxsize=8)
def loaded_parameters(spec: ModelSpec) -> tuple[Weight, ...]:
    """What an engine holds before its kernels rearrange it, in the order of the model."""
    if spec.quantization is None:
        return plain_parameters(spec)
    return tuple(w for weight in plain_parameters(spec) for w in spec.quantization.loaded(weight))


@lru_cache(maxsize=8)
def plain_parameters(spec: ModelSpec) -> tuple[Weight, ...]:
    """Every parameter as if nothing were quantized."""
    return tuple(_weights(spec))


def stage_layers(spec: ModelSpec, rank: Rank) -> range:
    """The decoder layers of a rank's pipeline stage.

    Raises:
        LayoutError: fewer layers than stages.
    """
    return pipeline_layers(spec.num_layers, rank.parallel.pipeline_parallel_size, rank.pp_rank)


@lru_cache(maxsize=64)
def stage_parameters(spec: ModelSpec, rank: Rank) -> tuple[Weight, ...]:
    """Those of `plain_parameters` that a rank's pipeline stage holds."""
    weights = plain_parameters(spec)
    return tuple(weight for weight in weights if on_rank(weight, rank, spec.num_layers))


def parameter_count(spec: ModelSpec) -> int:
    """Elements of all parameters: no padding, no scales, and quantized ones as if they were not."""
    return sum(
        max(weight.experts, 1)
        * sum(part.rows for part in weight.parts if not part.repeats)
        * (weight.columns or 1)
        for weight in plain_parameters(spec)
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
    for axis in axes(spec, experts=False):
        axis.span(rank)
    if parallel.expert_parallel:
        for count in {weight.experts for weight in loaded_parameters(spec) if weight.experts}:
            rank.experts(count)
    else:
        for axis in axes(spec, experts=True):
            axis.span(rank.for_experts())
    if not parallel.uneven:
        _check_full_norms(spec, parallel.tensor_parallel_size)


def _check_full_norms(spec: ModelSpec, tensor_parallel_size: int) -> None:
    """vLLM gathers the keys of all ranks for a norm over all heads, and cannot with copies."""
    for mixer in spec.mixers:
        if not isinstance(mixer, Attention) or mixer.qk_norm is not QKNorm.FULL:
            continue
        kv_heads = mixer.num_kv_heads
        if tensor_parallel_size > kv_heads:
            raise LayoutError(
                f"tensor parallel size {tensor_parallel_size} is more than "
                f"num_key_value_heads = {kv_heads}, and vLLM cannot copy KV heads of "
                f"{spec.architecture}, which normalizes all keys together"
            )


@lru_cache(maxsize=8)
def axes(spec: ModelSpec, *, experts: bool) -> tuple[Axis, ...]:
    """Everything that a tensor parallel layout has to divide, of experts or of all else."""
    found: dict[Axis, None] = {}
    for weight in loaded_parameters(spec):
        if (weight.experts > 0) is not experts:
            continue
        if weight.input_axis is not None and weight.cut is Cut.INPUT:
            found[weight.input_axis] = None
        if weight.cut is Cut.OUTPUT:
            found |= {part.axis: None for part in weight.parts if part.axis is not None}
    return tuple(found)


def _weights(spec: ModelSpec) -> Iterator[Weight]:
    if spec.listed is not None:
        yield from spec.listed
        return
    names, tied = spec.names, spec.tie_word_embeddings or spec.pooling
    vocab = Axis(label="the padded vocabulary", units=round_up(spec.vocab_size, VOCAB_PADDING))

    def table(name: str, where: Stage) -> Weight:
        return Weight(
            name=f"{name}.weight",
            parts=(Part(source=f"{name}.weight", rows=spec.vocab_size, axis=vocab),),
            columns=spec.embedding_size or spec.hidden_size,
            cut=Cut.OUTPUT,
            where=end(where),
        )

    def end(where: Stage) -> Stage:
        return Stage.EVERY if spec.every_stage_has_ends else where

    for tower in spec.towers:
        yield from tower.weights
    twice = spec.tie_word_embeddings and not spec.pooling
    embedding = table(names.embedding, Stage.BOTH_ENDS if twice else Stage.FIRST)
    embedding = grown(embedding, spec.added_embeddings)
    yield whole(embedding) if spec.whole_embedding else embedding
    yield from spec.extras
    for i, layer in enumerate(spec.layers):
        place = Place(prefix=f"{names.layers}.{i}", where=i, hidden_size=spec.hidden_size)
        for block in (*layer.mixers, layer.mlp, *layer.extras):
            if block is not None:
                yield from block.weights(place)
        for name in layer_norms(spec, layer):
            yield from norm(f"{place.prefix}.{name}", spec.hidden_size, i, bias=spec.norm_bias)
    if names.norm is not None:
        everywhere = spec.every_stage_has_norm
        where = end(Stage.LAST)
        if everywhere is not None:
            where = Stage.EVERY if everywhere else Stage.LAST
        yield from norm(names.norm, spec.hidden_size, where, bias=spec.norm_bias)
    if not tied:
        head = table(names.head, Stage.LAST)
        yield replace(head, where=Stage.LAST) if spec.every_stage_has_head is False else head
    if spec.head_bias and not spec.pooling:
        part = Part(source=f"{names.head}.bias", rows=spec.vocab_size, axis=vocab)
        name = f"{names.head}.bias"
        yield Weight(name=name, parts=(part,), cut=Cut.OUTPUT, where=end(Stage.LAST))


def grown(table: Weight, more: int) -> Weight:
    """The table with more rows, and padding anew."""
    (part,) = table.parts
    if not more or part.axis is None:
        return table
    rows = part.rows + more
    axis = replace(part.axis, units=round_up(rows, VOCAB_PADDING))
    return replace(table, parts=(replace(part, rows=rows, axis=axis),))


def whole(weight: Weight) -> Weight:
    """The weight, uncut and without padding."""
    parts = tuple(replace(part, axis=None) for part in weight.parts)
    return replace(weight, cut=Cut.NONE, parts=parts, input_axis=None)


def layer_norms(spec: ModelSpec, layer: Layer) -> tuple[str, ...]:
    """Names of the norms of a layer."""
    if layer.norms is not None:
        return layer.norms
    return NORMS[spec.norm_style] if spec.names.layer_norms is None else spec.names.layer_norms
