"""The second way in which the built-in runtime executes a model: by transformers' modelling code.

It is for what the runtime's own decoder does not know. Weights and KV cache are the same; what the
code of others allocates during a step is estimated from the usual temporaries of a decoder layer.
"""

from collections.abc import Iterator
from dataclasses import replace

from tightfit.errors import UnsupportedModelError, UsageError
from tightfit.model.blocks.attention import Rope, head_axes
from tightfit.model.blocks.mlp import DenseMLP, MoE
from tightfit.model.layout import Rank
from tightfit.model.spec import Layer, ModelSpec
from tightfit.planner.engines.builtin_cuda import calibrated, staging_bytes
from tightfit.planner.engines.builtin_layers import BIAS_ELEMENTS, GATHER_TOKENS
from tightfit.planner.engines.builtin_memory import (
    ESTIMATED,
    HEAP_BYTES,
    SAMPLER_ELEMENTS,
    SORT_BYTES,
    process_baseline,
)
from tightfit.planner.engines.builtin_models import unexecuted
from tightfit.planner.options import Resolved
from tightfit.planner.plan import Component
from tightfit.planner.weights import held
from tightfit.units import GiB, MiB, dtype_bytes, format_bytes

_LIBRARIES_BYTES = 170 * MiB
"""Resident bytes of transformers 5.23 and accelerate beyond torch: 170 to 175 MiB measured."""
MODEL_IMPLS = ("auto", "builtin", "transformers")


def by_transformers(spec: ModelSpec, model_impl: str) -> bool:
    """Whether transformers' code executes a model; `auto` takes our own decoder where it can.

    Raises:
        UnsupportedModelError: neither can, or not the one that is asked for.
        UsageError: there is no such implementation.
    """
    if model_impl not in MODEL_IMPLS:
        raise UsageError(
            f"unknown --model-impl {model_impl!r}", hint=f"one of {', '.join(MODEL_IMPLS)}"
        )
    missing = unexecuted(spec)
    if model_impl == "builtin" or (model_impl == "auto" and missing is None):
        if missing is None:
            return False
        raise UnsupportedModelError(
            f"the builtin runtime has no code of its own for {spec.architecture}: {missing}",
            hint="leave out --model-impl, or serve it with vLLM and plan it with --engine vllm",
        )
    obstacle = _obstacle(spec)
    if obstacle is None:
        return True
    own = "" if missing is None else f"the builtin runtime does not execute {missing}, and "
    raise UnsupportedModelError(
        f"{spec.architecture} cannot run: {own}transformers' code cannot use its KV cache, since "
        f"{obstacle}",
        hint="serve it with vLLM, and plan it with --engine vllm",
    )


def _obstacle(spec: ModelSpec) -> str | None:
    """Why transformers' code cannot run with a paged KV cache of one kind."""
    if spec.encoder_tokens:
        return "it has an encoder, to which its decoder attends"
    if spec.pooling:
        return "it samples nothing"
    if spec.quantization is not None:
        return "its weights are quantized"
    if spec.alias is not None:
        return "its tensors have other names than in published checkpoints"
    for layer in spec.layers:
        kinds = [type(mixer).__name__ for mixer in layer.mixers]
        if kinds != ["Attention"]:
            return f"a layer has {' and '.join(kinds) or 'nothing'} where plain attention is needed"
        attention = layer.attention
        if attention.chunk or attention.alibi or attention.shares_cache or attention.value_dim:
            return "its attention has chunks, ALiBi, shared keys or values of another size"
    return None


def offloaded_layers(spec: ModelSpec, dtype: str, limit_bytes: int) -> tuple[int, int]:
    """How many of the last layers stay on the host, and their bytes: what fits into the limit."""
    moved = 0
    if not limit_bytes:
        return 0, moved
    sizes = _layer_bytes(spec, dtype)
    for count, size in enumerate(reversed(sizes)):
        if moved + size > limit_bytes:
            return count, moved
        moved += size
    return len(sizes), moved


def largest_layer(spec: ModelSpec, dtype: str) -> int:
    """Bytes of the largest layer, which an offloaded one takes on the device while it computes."""
    return max(_layer_bytes(spec, dtype))


def _layer_bytes(spec: ModelSpec, dtype: str) -> list[int]:
    sizes = [0] * spec.num_layers
    rank = Rank()
    for weight in held(spec, rank):
        if isinstance(weight.where, int):
            elements = weight.census(rank).elements
            sizes[weight.where] += dtype_bytes(weight.held_dtype(dtype)) * elements
    return sizes


def transformers_components(
    spec: ModelSpec, resolved: Resolved, *, device: str, tokenizer_json_bytes: int
) -> tuple[Component, ...]:
    """Everything beside weights and KV cache; estimates but for what is ours.

    Args:
        spec: the model.
        resolved: options of the plan.
        device: `cpu` or `cuda`.
        tokenizer_json_bytes: size of `tokenizer.json`.
    """
    b = dtype_bytes(resolved.dtype.value)
    seqs, vocab = resolved.max_num_seqs.value, spec.vocab_size
    tokens = min(resolved.max_num_batched_tokens.value, seqs * resolved.max_model_len.value)
    # Python's frames hold the embeddings, the input of a layer and its residual until they return.
    stream = 3 * tokens * spec.hidden_size * b
    tables = tokens * b * sum(2 * rope.rotary_dim for rope in _ropes(spec))
    name, largest = max(
        (stage for layer in dict.fromkeys(spec.layers) for stage in _stages(spec, layer, resolved)),
        key=lambda stage: stage[1],
    )
    limit = resolved.asked.cpu_offload_gb * GiB
    moving = largest_layer(spec, resolved.dtype.value) if limit else 0
    moved = f" + an offloaded layer while it computes: {moving}" if moving else ""
    activations = stream + tables + largest + moving
    heap = HEAP_BYTES if device == "cpu" else 0
    rows = min(seqs, max(1, SAMPLER_ELEMENTS // vocab))
    logits = seqs * vocab * (b + 4) + rows * vocab * SORT_BYTES
    needed = stream + logits
    found = [
        Component(
            name="activations",
            planned_bytes=activations + heap,
            origin="derived",
            formula=f"estimated for transformers' code: T = {tokens}, H = {spec.hidden_size}, "
            f"b = {b}; embeddings, input and residual of a layer: {stream} + sines and cosines: "
            f"{tables} + {name}: {largest}{moved}"
            + (f" + {heap} that malloc keeps" if heap else ""),
            detail={ESTIMATED: 1},
        ),
        Component(
            name="logits_and_sampler",
            planned_bytes=max(0, needed - activations),
            origin="derived",
            formula=f"estimated: residual stream {stream} + logits N x {vocab} x ({b} + 4) and "
            f"{rows} sorted rows x {vocab} x {SORT_BYTES}: {logits} = {needed}, less the "
            f"activations, which are freed before: {activations}",
            detail={ESTIMATED: 1, "alone_bytes": needed},
        ),
    ]
    if device == "cpu":
        baseline = process_baseline(Rank(), tokenizer_json_bytes)
        libraries = _LIBRARIES_BYTES
        found.append(
            replace(
                baseline,
                planned_bytes=baseline.planned_bytes + libraries,
                formula=f"{baseline.formula} + {format_bytes(libraries)} for transformers",
            )
        )
        return tuple(found)
    staging = staging_bytes(resolved)
    return (
        Component(
            name="persistent_buffers",
            planned_bytes=staging,
            origin="exact",
            formula=f"inputs and block tables of a step: {staging}",
        ),
        *found,
        calibrated("cuda_context", "CUDA, its libraries and the kernels of the runtime"),
        calibrated("allocator_cache", "blocks of PyTorch's allocator that are partly used"),
    )


def _ropes(spec: ModelSpec) -> set[Rope]:
    return {rope for layer in spec.layers if (rope := layer.attention.rope) is not None}


def _stages(spec: ModelSpec, layer: Layer, resolved: Resolved) -> Iterator[tuple[str, int]]:
    """What is there at once in a layer, beside the residual stream."""
    hidden, b = spec.hidden_size, dtype_bytes(resolved.dtype.value)
    seqs, length = resolved.max_num_seqs.value, resolved.max_model_len.value
    tokens = min(resolved.max_num_batched_tokens.value, seqs * length)
    q, kv = (axis.rows for axis in head_axes(layer.attention))
    yield "norm in float32 (H x b + 2H x 4) x T", tokens * hidden * (b + 8)
    yield (
        "attention (H + 3Q + 4KV) x T x b: projections, rotated, and laid out anew",
        tokens * (hidden + 3 * q + 4 * kv) * b,
    )
    gathered = 2 * kv * b * max(length, min(seqs * length, GATHER_TOKENS))
    masks = min(tokens * length, BIAS_ELEMENTS) * (b + 2)
    yield (
        f"attention (2Q + 2KV) x T x b, with gathered keys and values {gathered} and masks {masks}",
        tokens * (hidden + 2 * q + 2 * kv) * b + gathered + masks,
    )
    mlp = layer.mlp
    if isinstance(mlp, DenseMLP):
        inner = mlp.intermediate_size
        yield f"MLP (H + 3I) x T x b with I = {inner}", tokens * (hidden + 3 * inner) * b
    if isinstance(mlp, MoE):
        inner = mlp.intermediate_size
        yield (
            f"experts (2H + {mlp.top_k} x (2H + 3I)) x T x b with I = {inner}",
            tokens * (2 * hidden + mlp.top_k * (2 * hidden + 3 * inner)) * b,
        )
