"""What a step of the built-in runtime allocates on a CPU, as its forward pass shows.

The runtime is written so that these formulas are simple: temporaries that would grow with the
product of two options are processed in pieces, whose sizes are the constants below. The runtime
imports them from here, so that plan and execution cannot disagree.

Sizes are per rank. T is `max_num_batched_tokens`, N is `max_num_seqs`, L is `max_model_len`, H the
hidden size, Q and KV the features of the rank's query and KV heads, I its share of the inner size,
b the bytes of an element.
"""

import json
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from tightfit.model.layout import Rank
from tightfit.model.parameters import plain_parameters
from tightfit.model.spec import ModelSpec, ropes
from tightfit.planner.engines.builtin_layers import (
    FP8_ELEMENTS,
    decoded_latents_bytes,
    layer_stages,
    layers_of,
    rope_bytes,
    windows,
)
from tightfit.planner.engines.builtin_quantized import decoding_bytes, repacked_bytes
from tightfit.planner.engines.builtin_states import states_formula
from tightfit.planner.plan import Component
from tightfit.units import MiB, dtype_bytes, format_bytes, round_up

NORM_ROWS = 256
"""Rows that a norm converts to float32 at once."""
SAMPLER_ELEMENTS = 2**22
"""Logits that a CPU samples from at once, or sorts for top-k and top-p, if a row has not more."""
GATHERED_ELEMENTS = 2**25
"""Logits that GPUs give each other at once for top-k and top-p, unless one row alone has more."""

HEAP_BYTES = 6 * MiB
"""Small blocks that malloc keeps, and kernels compiled for the shapes of a step, on a CPU: measured
to be 3 to 9 MiB, whatever the model."""

OTHER_VERSION = "measured_with_another_version"
"""`detail` of a calibrated component, where the installed torch was never measured."""

ESTIMATED = "estimated"
"""`detail` of a component that nobody could know exactly: it is shown, and not judged."""

SORT_BYTES = 21
"""Per logit: sorted values and their order (4 + 8), probabilities and their sums (4 + 4), a
mask (1); the draw itself needs less."""


def step_components(
    spec: ModelSpec,
    rank: Rank,
    *,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    block_size: int,
    kv_cache_dtype: str | None = None,
    tokenizer_json_bytes: int = 0,
) -> tuple[Component, ...]:
    """Everything that a rank of the built-in runtime holds on a CPU beside weights and KV cache.

    Args:
        spec: the model.
        rank: which rank of which layout.
        dtype: of computation, in safetensors' spelling.
        max_model_len: L.
        max_num_seqs: N.
        max_num_batched_tokens: T.
        block_size: tokens per block of the KV cache.
        kv_cache_dtype: of keys and values, if it is not `dtype`.
        tokenizer_json_bytes: size of `tokenizer.json`, which rank 0 loads.
    """
    b = dtype_bytes(dtype)
    tokens = min(max_num_batched_tokens, max_num_seqs * max_model_len)
    length = round_up(max_model_len, block_size)
    # A piece in float32 and in 8 bits.
    converted = 0 if kv_cache_dtype in (None, dtype) else 5 * FP8_ELEMENTS
    activations, formula = _activations(spec, rank, dtype, tokens, max_num_seqs, length, converted)
    found = [
        _persistent_buffers(spec, rank, dtype, max_model_len, max_num_seqs),
        Component(
            name="activations",
            planned_bytes=activations + HEAP_BYTES,
            origin="derived",
            formula=f"{formula} + {HEAP_BYTES} that malloc keeps",
        ),
        _logits(spec, rank, b, max_num_seqs, tokens, activations),
    ]
    if dtype == "BF16" and (zeros := repacked_bytes(spec, rank, b)):
        found.insert(
            0,
            Component(
                name="repacked_weights",
                planned_bytes=zeros,
                origin="derived",
                formula="zero points of groups as bfloat16, for torch's int4 kernel, less those "
                f"that the checkpoint holds: {zeros}",
            ),
        )
    return (*found, process_baseline(rank, tokenizer_json_bytes))


def _persistent_buffers(
    spec: ModelSpec, rank: Rank, dtype: str, max_model_len: int, max_num_seqs: int
) -> Component:
    b = dtype_bytes(dtype)
    states, term = states_formula(spec, rank, dtype, max_num_seqs)
    dims = [rope.rotary_dim for rope in ropes(spec.layers)]
    tables = rope_bytes(spec, b, max_model_len)
    formula = (
        f"rope tables: max_model_len x rotary_dim x element, {max_model_len} x {sum(dims)}: "
        f"{tables}"
    )
    if latents := decoded_latents_bytes(spec, rank, b):
        formula += f" + quantized matrices that are absorbed, decoded: {latents}"
    return Component(
        name="persistent_buffers",
        planned_bytes=tables + latents + states,
        origin="exact",
        formula=formula + term,
    )


def _activations(
    spec: ModelSpec, rank: Rank, dtype: str, tokens: int, seqs: int, length: int, converted: int
) -> tuple[int, str]:
    """Peak of the forward pass: what all layers share, and the largest layer.

    `converted` is what keys and values take on their way into a cache of another dtype, or back.
    """
    hidden, b = spec.hidden_size, dtype_bytes(dtype)
    shared = {
        "residual stream T x H x b": tokens * hidden * b,
        "token ids, positions, slots": 3 * 8 * tokens,
        "rope rows": rope_bytes(spec, b, tokens),
        "decode masks N x L x b": seqs
        * b
        * sum(min(length, window or length) for window in windows(layers_of(spec, rank))),
        "a piece of the fp8 cache": converted,
    }
    name, largest = max(
        (
            stage
            for stages in layer_stages(spec, rank, dtype, tokens, seqs, length)
            for stage in stages.items()
        ),
        key=lambda stage: stage[1],
    )
    if decoded := decoding_bytes(spec, rank, b, tokens):
        shared["a quantized matrix while it is used"] = decoded
    total = sum(shared.values()) + largest
    terms = [f"{label}: {size}" for label, size in shared.items() if size]
    return total, (
        f"T = {tokens}, N = {seqs}, L = {length}, H = {hidden}, b = {b}; "
        + " + ".join(terms)
        + f" + the largest stage of a layer, {name}: {largest}"
    )


def _logits(
    spec: ModelSpec, rank: Rank, b: int, seqs: int, tokens: int, activations: int
) -> Component:
    """Logits take the place of a layer's temporaries, so only what exceeds them counts."""
    if not rank.is_last_stage:
        return no_logits()
    mine, vocab, hidden = output_columns(spec, rank), spec.vocab_size, spec.hidden_size
    rows = min(seqs, max(1, SAMPLER_ELEMENTS // vocab))
    stages = {
        f"hidden states and logits N x (2H + {mine}) x b": seqs * (2 * hidden + mine) * b,
        f"hidden states and logits N x (H + {mine}) x b, and {rows} sorted rows x {vocab} x "
        f"{SORT_BYTES}": seqs * (hidden + mine) * b + rows * vocab * SORT_BYTES,
    }
    name, largest = max(stages.items(), key=lambda item: item[1])
    return logits_component(tokens * hidden * b, name, largest, activations)


def output_columns(spec: ModelSpec, rank: Rank) -> int:
    """Columns of the logits that a rank of the last stage computes."""
    table = next(w for w in plain_parameters(spec) if w.name == f"{spec.names.embedding}.weight")
    return table.rank_shape(rank)[0]


def logits_component(residual: int, label: str, size: int, activations: int) -> Component:
    """What logits and sampler need beside the residual stream, less what is freed before them."""
    needed = residual + size
    return Component(
        name="logits_and_sampler",
        planned_bytes=max(0, needed - activations),
        origin="derived",
        formula=f"residual stream {residual} + {label}: {size} = {needed}, less the activations, "
        f"which are freed before: {activations}",
        detail={"alone_bytes": needed},
    )


def no_logits() -> Component:
    """A stage of the pipeline that is not the last one."""
    return Component(
        name="logits_and_sampler",
        planned_bytes=0,
        origin="exact",
        formula="the last stage has the logits: 0",
    )


def process_baseline(rank: Rank, tokenizer_json_bytes: int) -> Component:
    """Python, torch's libraries and, with several ranks, gloo: measured, not computed."""
    data = _calibration()
    entry = _nearest(data["process_baseline"], _torch_version())
    several = rank.parallel.world_size > 1
    process = int(entry["rank_bytes" if several else "alone_bytes"])
    tokenizer = 0
    if rank.rank == 0 and tokenizer_json_bytes:
        per_byte = data["tokenizer"]["bytes_per_json_byte"]
        tokenizer = int(data["tokenizer"]["base_bytes"] + per_byte * tokenizer_json_bytes)
    installed = _torch_version()
    formula = f"{format_bytes(process)} measured for a process with torch {entry['torch']}"
    if installed not in ("", entry["torch"]):
        formula += f" ({installed} is installed)"
    if tokenizer:
        formula += f" + {format_bytes(tokenizer)} for the tokenizer"
    return Component(
        name="process_baseline",
        planned_bytes=process + tokenizer,
        origin="calibrated",
        formula=formula,
        detail={} if entry["torch"] == installed else {OTHER_VERSION: 1},
    )


@lru_cache(maxsize=1)
def _calibration() -> dict[str, Any]:
    text = files(__package__).joinpath("calibration.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def _nearest(entries: list[dict[str, Any]], wanted: str) -> dict[str, Any]:
    """The entry of the wanted torch version, or of the next closest release."""

    def distance(entry: dict[str, Any]) -> tuple[bool, int, int]:
        major, minor = _release(entry["torch"])
        wanted_major, wanted_minor = _release(wanted)
        return entry["torch"] != wanted, abs(major - wanted_major), abs(minor - wanted_minor)

    return min(entries, key=distance)


def _release(text: str) -> tuple[int, int]:
    numbers = [int(part) if part.isdigit() else 0 for part in [*text.split("."), "", ""][:2]]
    return numbers[0], numbers[1]
