"""The parameters that an engine holds for a `ModelSpec`, with vLLM's fused names.

Sources are named as Hugging Face checkpoints name them. One function serves every decoder-only
family, because a `ModelSpec` says all that is different about them.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from tightfit.errors import LayoutError
from tightfit.model.blocks.attention import attention_weights
from tightfit.model.blocks.linear import vector
from tightfit.model.blocks.mlp import dense_weights, expert_weights
from tightfit.model.layout import Axis, Cut, Parallel, Part, Rank, Stage, Weight, pipeline_layers
from tightfit.model.quantization import in_blocks
from tightfit.model.spec import ModelSpec, MoE, NormStyle, QKNorm
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
    """Every parameter, in the order of the model.

    A tied model has no `lm_head.weight`: its embedding serves both ends.
    """
    weights = list(_weights(spec))
    if spec.quantization is not None:
        weights = [w for weight in weights for w in in_blocks(weight, spec.quantization)]
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
        yield from attention_weights(spec, layer.attention, f"{prefix}.self_attn", i)
        if isinstance(layer.mlp, MoE):
            yield from expert_weights(spec, layer.mlp, f"{prefix}.{layer.mlp.module}", i)
        else:
            yield from dense_weights(spec, layer.mlp, f"{prefix}.mlp", i)
        for norm in NORMS[spec.norm_style]:
            yield vector(f"{prefix}.{norm}.weight", spec.hidden_size, i)
    yield vector("model.norm.weight", spec.hidden_size, Stage.LAST)
    if not tied:
        yield table("lm_head.weight", Stage.LAST)
