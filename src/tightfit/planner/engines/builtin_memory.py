"""What a step of the built-in runtime allocates, in formulas that are read off its forward pass.

The runtime is written so that these formulas are simple: temporaries that would grow with the
product of two options are processed in pieces, whose sizes are the constants below. The runtime
imports them from here, so that plan and execution cannot disagree.

Sizes are per rank. T is `max_num_batched_tokens`, N is `max_num_seqs`, L is `max_model_len`, H the
hidden size, Q and KV the features of the rank's query and KV heads, I its share of the inner size,
b the bytes of an element.
"""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from tightfit.model.blocks.attention import Attention, head_axes
from tightfit.model.blocks.mlp import MoE
from tightfit.model.layout import Rank
from tightfit.model.parameters import plain_parameters
from tightfit.model.spec import Layer, ModelSpec, ropes
from tightfit.planner.engines.builtin_quantized import decoding_bytes, repacked_bytes
from tightfit.planner.plan import Component
from tightfit.units import MiB, dtype_bytes, format_bytes, round_up

GATHER_TOKENS = 8192
"""Cached tokens that a group of decoding sequences gathers at once, unless one alone has more."""
BIAS_ELEMENTS = 2**20
"""Elements of a mask: longer prompts attend in chunks of queries."""
SCORE_ELEMENTS = 2**21
"""Elements of explicit attention scores, which only soft-capped attention stores."""
NORM_ROWS = 256
"""Rows that a norm converts to float32 at once."""
EXPERT_ROWS = 512
"""Tokens that an expert takes at once."""
SAMPLER_ELEMENTS = 2**22
"""Logits that top-k and top-p sort at once, unless one row alone has more."""

_HEAP_BYTES = 6 * MiB
"""Small blocks that malloc keeps, and kernels compiled for the shapes of a step, on a CPU: measured
to be 3 to 9 MiB, whatever the model."""

OTHER_VERSION = "measured_with_another_version"
"""`detail` of a calibrated component, where the installed torch was never measured."""

_SORT_BYTES = 26
"""Per logit: a copy and its sorted values (4 + 4), order (8), probabilities and their sums (4 + 4),
and masks (2)."""


def step_components(
    spec: ModelSpec,
    rank: Rank,
    *,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    block_size: int,
    device: str,
    tokenizer_json_bytes: int = 0,
) -> tuple[Component, ...]:
    """Everything that a rank of the built-in runtime holds beside weights and KV cache.

    Args:
        spec: the model.
        rank: which rank of which layout.
        dtype: of computation, in safetensors' spelling.
        max_model_len: L.
        max_num_seqs: N.
        max_num_batched_tokens: T.
        block_size: tokens per block of the KV cache.
        device: `cpu` or `cuda`; only on a CPU is the process itself counted.
        tokenizer_json_bytes: size of `tokenizer.json`, which rank 0 loads.
    """
    b = dtype_bytes(dtype)
    tokens = min(max_num_batched_tokens, max_num_seqs * max_model_len)
    length = round_up(max_model_len, block_size)
    activations, formula = _activations(spec, rank, b, tokens, max_num_seqs, length)
    heap = _HEAP_BYTES if device == "cpu" else 0
    found = [
        _persistent_buffers(spec, b, max_model_len),
        Component(
            name="activations",
            planned_bytes=activations + heap,
            origin="derived",
            formula=formula + (f" + {heap} that malloc keeps" if heap else ""),
        ),
        _logits(spec, rank, b, max_num_seqs, tokens, activations),
    ]
    if device == "cpu" and dtype == "BF16" and (zeros := repacked_bytes(spec, rank, b)):
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
    if device == "cpu":
        found.append(_process_baseline(rank, tokenizer_json_bytes))
    return tuple(found)


def _features(attention: Attention, rank: Rank) -> tuple[int, int]:
    """Q and KV of a rank."""
    queries, keys = head_axes(attention)
    return queries.span(rank)[1], keys.span(rank)[1]


def _persistent_buffers(spec: ModelSpec, b: int, max_model_len: int) -> Component:
    dims = [rope.rotary_dim for rope in ropes(spec.layers)]
    return Component(
        name="persistent_buffers",
        planned_bytes=max_model_len * sum(dims) * b,
        origin="exact",
        formula="rope tables: max_model_len x rotary_dim x element = "
        + " + ".join(f"{max_model_len} x {dim} x {b}" for dim in dims),
    )


def _activations(
    spec: ModelSpec, rank: Rank, b: int, tokens: int, seqs: int, length: int
) -> tuple[int, str]:
    """Peak of the forward pass: what all layers share, and the largest layer."""
    hidden = spec.hidden_size
    windows = {layer.attention.window for layer in spec.layers}
    shared = {
        "residual stream T x H x b": tokens * hidden * b,
        "token ids, positions, slots": 3 * 8 * tokens,
        "rope rows": tokens * sum(rope.rotary_dim for rope in ropes(spec.layers)) * b,
        "decode masks N x L x b": seqs * b * sum(min(length, w or length) for w in windows),
    }
    stages = (
        stage
        for index, layer in _distinct(spec.layers)
        for stage in (
            _attention_stages(spec, layer.attention, rank, b, tokens, seqs, length),
            _mlp_stages(spec, index, layer, rank, b, tokens),
        )
    )
    name, largest = max(
        ((name, size) for stage in stages for name, size in stage.items()), key=lambda x: x[1]
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


def _attention_stages(
    spec: ModelSpec, attention: Attention, rank: Rank, b: int, tokens: int, seqs: int, length: int
) -> Mapping[str, int]:
    """Peaks within attention; input and qkv live throughout."""
    hidden = spec.hidden_size
    q, kv = _features(attention, rank)
    always = tokens * (hidden + q + 2 * kv) * b
    gathered = 2 * kv * b * max(length, min(seqs * length, GATHER_TOKENS))
    masks = min(tokens * length, BIAS_ELEMENTS) * (b + 2)
    if attention.softcap is not None:
        heads = q // attention.head_dim
        masks += max(min(tokens * length * heads, SCORE_ELEMENTS), length * heads) * 8
    return {
        "rope (H + Q + 2KV + (Q + KV)/2) x T x b": always + tokens * (q + kv) * b // 2,
        "gathered keys and values": always + tokens * q * b + gathered + masks,
        "prompt attention (H + 3Q + 4KV) x T x b": always + tokens * 2 * (q + kv) * b,
        "output projection (2H + 2Q + 2KV) x T x b": always + tokens * (q + hidden) * b,
    }


def _mlp_stages(
    spec: ModelSpec, index: int, layer: Layer, rank: Rank, b: int, tokens: int
) -> Mapping[str, int]:
    """Peaks within the MLP; its input lives throughout."""
    hidden = spec.hidden_size
    if isinstance(layer.mlp, MoE):
        moe = layer.mlp
        inner = _rows(spec, rank, f"model.layers.{index}.{moe.module}.experts.w13_weight") // 2
        rows = min(tokens, EXPERT_ROWS)
        routing = tokens * (moe.num_experts * (b + 8) + moe.top_k * 12)
        expert = rows * (2 * hidden + 3 * inner) * b
        return {
            "experts (2H + routing) x T x b, and rows of one expert": 2 * tokens * hidden * b
            + routing
            + expert
        }
    inner = _rows(spec, rank, f"model.layers.{index}.mlp.gate_up_proj.weight") // 2
    return {
        f"MLP (H + 3I) x T x b with I = {inner}": tokens * (hidden + 3 * inner) * b,
        f"down projection (2H + I) x T x b with I = {inner}": tokens * (2 * hidden + inner) * b,
    }


def _logits(
    spec: ModelSpec, rank: Rank, b: int, seqs: int, tokens: int, activations: int
) -> Component:
    """Logits take the place of a layer's temporaries, so only what exceeds them counts."""
    table = next(w for w in plain_parameters(spec) if w.name == "model.embed_tokens.weight")
    shares = [table.rank_shape(other)[0] for other in rank.parallel.ranks()]
    mine, vocab = shares[rank.tp_rank], spec.vocab_size
    label = f"hidden states and logits N x (2H + {mine}) x b"
    gathering = seqs * (2 * spec.hidden_size + mine) * b
    stages = {label: gathering}
    if rank.tp_rank == 0:
        logits = seqs * vocab * 4
        if len(shares) > 1:
            gathering += seqs * len(shares) * max(shares) * b
            label += f", those of {len(shares)} ranks"
        rows = min(seqs, max(1, SAMPLER_ELEMENTS // vocab))
        stages = {
            f"{label}, and float32 logits N x {vocab} x 4": gathering + logits,
            f"float32 logits N x {vocab} x 4, and {rows} sorted rows x {vocab} x {_SORT_BYTES}": (
                seqs * spec.hidden_size * b + logits + rows * vocab * _SORT_BYTES
            ),
        }
    name, largest = max(stages.items(), key=lambda item: item[1])
    residual = tokens * spec.hidden_size * b
    needed = residual + largest
    return Component(
        name="logits_and_sampler",
        planned_bytes=max(0, needed - activations),
        origin="derived",
        formula=f"N = {seqs}, H = {spec.hidden_size}, b = {b}; residual stream {residual} + "
        f"{name}: {largest} = {needed}, less the activations, which are freed before: "
        f"{activations}",
        detail={"alone_bytes": needed},
    )


def _process_baseline(rank: Rank, tokenizer_json_bytes: int) -> Component:
    """Python, torch's libraries and, with several ranks, gloo: measured, not computed."""
    data = _calibration()
    entry = _nearest(data["process_baseline"], _torch_version())
    several = rank.parallel.tensor_parallel_size > 1
    process = int(entry["rank_bytes" if several else "alone_bytes"])
    tokenizer = 0
    if rank.tp_rank == 0 and tokenizer_json_bytes:
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


def _rows(spec: ModelSpec, rank: Rank, name: str) -> int:
    """Rows of a parameter on a rank."""
    weight = next(w for w in plain_parameters(spec) if w.name == name)
    return weight.rank_shape(rank)[-2]


def _distinct(layers: Iterable[Layer]) -> list[tuple[int, Layer]]:
    """The first of each kind of layer, with its index."""
    found: dict[Layer, int] = {}
    for index, layer in enumerate(layers):
        found.setdefault(layer, index)
    return [(index, layer) for layer, index in found.items()]
