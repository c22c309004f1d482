"""What the built-in runtime allocates on a GPU, beside weights and KV cache.

The formulas are read off the runtime, which imports the constants from here. Sizes are per rank. T
is `max_num_batched_tokens`, N is `max_num_seqs`, L is `max_model_len`, H the hidden size, Q, K and
V the features of the rank's heads, I its share of the inner size, b the bytes of an element.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from typing import Any

from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.layout import Rank
from tightfit.model.parameters import stage_layers
from tightfit.model.spec import Layer, ModelSpec
from tightfit.planner.engines.builtin_gpu_layers import gpu_stages
from tightfit.planner.engines.builtin_layers import decoded_latents_bytes, rope_bytes
from tightfit.planner.engines.builtin_memory import (
    ESTIMATED,
    GATHERED_ELEMENTS,
    logits_component,
    no_logits,
    output_columns,
)
from tightfit.planner.engines.builtin_paged import workspace_formula
from tightfit.planner.engines.builtin_quantized import gpu_repacked_bytes, gpu_workspaces
from tightfit.planner.engines.builtin_states import states_formula
from tightfit.planner.options import Resolved
from tightfit.planner.plan import Component
from tightfit.units import cdiv, dtype_bytes

STAGED_STEPS = 3
"""Steps whose inputs may be on their way to a device at the same time."""
LARGEST_GRAPH = 512
"""Decoding sequences beyond which a step is long enough to be launched kernel by kernel."""


def gpu_components(spec: ModelSpec, rank: Rank, resolved: Resolved) -> tuple[Component, ...]:
    """Everything that a rank holds on its GPU beside weights and KV cache."""
    b = dtype_bytes(resolved.dtype.value)
    seqs = resolved.max_num_seqs.value
    length = resolved.max_model_len.value
    tokens = min(resolved.max_num_batched_tokens.value, seqs * length)
    assert resolved.cudagraph_capture_sizes is not None
    sizes = resolved.cudagraph_capture_sizes.value
    activations, formula = step_bytes(spec, rank, b, tokens, seqs)
    found = [
        _persistent_buffers(spec, rank, resolved, b, max(sizes, default=0)),
        Component(name="activations", planned_bytes=activations, origin="derived", formula=formula),
        _logits(spec, rank, b, seqs, tokens, activations),
        _graphs(spec, rank, b, sizes),
        calibrated("cuda_context", "CUDA, its libraries and the kernels of the runtime"),
        calibrated("allocator_cache", "blocks of PyTorch's allocator that are partly used"),
    ]
    if b == 2 and (repacked := gpu_repacked_bytes(spec, rank)):
        formula = f"zero points as bytes, and scales for each output: {repacked}"
        found.insert(
            0,
            Component(
                name="repacked_weights", planned_bytes=repacked, origin="derived", formula=formula
            ),
        )
    if rank.parallel.world_size > 1:
        # Never measured with this runtime: vLLM's figure, which has more connections.
        nccl = calibrated("nccl", "NCCL's buffers, as of vLLM")
        found.append(replace(nccl, detail={ESTIMATED: 1}))
    return tuple(found)


def step_bytes(spec: ModelSpec, rank: Rank, b: int, tokens: int, seqs: int) -> tuple[int, str]:
    """The peak of a forward pass of so many tokens of so many sequences, and its formula."""
    residual = tokens * spec.hidden_size * b
    stages = gpu_stages(spec, rank, b, tokens, seqs)
    name, largest = max(stages, key=lambda stage: stage[1])
    return residual + largest, (
        f"T = {tokens}, H = {spec.hidden_size}, b = {b}; residual stream T x H x b: {residual} + "
        f"the largest stage of a layer, {name}: {largest}"
    )


def staging_bytes(resolved: Resolved) -> int:
    """Inputs of a step at fixed places: ids, positions, slots, rows, block tables."""
    tokens, seqs = resolved.max_num_batched_tokens.value, resolved.max_num_seqs.value
    blocks = cdiv(resolved.max_model_len.value, resolved.block_size.value)
    return 8 * (3 * tokens + 3 * seqs + 1) + 4 * (2 * seqs + 1 + seqs * blocks)


def _persistent_buffers(
    spec: ModelSpec, rank: Rank, resolved: Resolved, b: int, graph: int
) -> Component:
    length = resolved.max_model_len.value
    rope = rope_bytes(spec, b, length)
    staging = staging_bytes(resolved)
    hidden = graph * spec.hidden_size * b
    seqs = resolved.max_num_seqs.value
    states, term = states_formula(spec, rank, resolved.dtype.value, seqs)
    workspace, attention = workspace_formula(spec, rank, seqs, length)
    latents = decoded_latents_bytes(spec, rank, b)
    absorbed = f" + quantized matrices that are absorbed, decoded: {latents}" if latents else ""
    return Component(
        name="persistent_buffers",
        planned_bytes=rope + staging + hidden + states + workspace + latents,
        origin="exact",
        formula=f"rope tables: {rope} + inputs and block tables of a step: {staging} + outputs of "
        f"graphs {graph} x {spec.hidden_size} x {b}: {hidden}{attention}{term}{absorbed}",
    )


def _logits(
    spec: ModelSpec, rank: Rank, b: int, seqs: int, tokens: int, activations: int
) -> Component:
    """Logits take the place of a layer's temporaries, so only what exceeds them counts."""
    if not rank.is_last_stage:
        return no_logits()
    mine = output_columns(spec, rank)
    label = f"hidden states and logits N x (2H + {mine}) x b"
    size = seqs * (2 * spec.hidden_size + mine) * b
    if head := gpu_workspaces(spec, rank, b, seqs).get(f"{spec.names.head}.weight", 0):
        label += f", and a quantized head: {head}"
        size += head
    if rank.parallel.tensor_parallel_size > 1:
        gathered, term = _gathered(spec, rank, b, seqs)
        if gathered > size:
            label, size = term, gathered
    return logits_component(tokens * spec.hidden_size * b, label, size, activations)


def _gathered(spec: ModelSpec, rank: Rank, b: int, seqs: int) -> tuple[int, str]:
    """Logits that ranks give each other for top-k and top-p, some rows at a time.

    The rows are there as this rank's share, padded to the widest share, as the shares of all, and
    side by side.
    """
    mine, vocab = output_columns(spec, rank), spec.vocab_size
    stage = [other for other in rank.parallel.ranks() if other.pp_rank == rank.pp_rank]
    shares = [output_columns(spec, other) for other in stage]
    rows = min(seqs, max(1, GATHERED_ELEMENTS // vocab))
    widest, whole = max(shares), sum(shares)
    columns = mine + (widest if mine < widest else 0) + len(shares) * widest + whole
    size = seqs * (spec.hidden_size + mine) * b + rows * columns * b
    return size, (
        f"hidden states and logits N x (H + {mine}) x b, and {rows} rows that ranks give each "
        f"other x {columns} x b"
    )


def _graphs(spec: ModelSpec, rank: Rank, b: int, sizes: tuple[int, ...]) -> Component:
    """One pool for all graphs, as large as the largest step, and the driver's nodes."""
    if not sizes:
        return Component(
            name="cuda_graphs", planned_bytes=0, origin="exact", formula="no graphs: 0"
        )
    once = int(calibration()["graph_bytes"])
    pool, _ = step_bytes(spec, rank, b, max(sizes), max(sizes))
    mine = [_kind(spec.layers[i]) for i in stage_layers(spec, rank)]
    each = sum(int(calibration()["graph_bytes_per_layer"][kind]) for kind in mine)
    nodes = each * len(sizes)
    return Component(
        name="cuda_graphs",
        planned_bytes=pool + once + nodes,
        origin="calibrated",
        formula=f"a step of {max(sizes)} tokens: {pool} + cuBLAS and what else the first capture "
        f"takes: {once} + nodes in the driver, {len(sizes)} graphs x {each} of {len(mine)} layers: "
        f"{nodes}",
    )


def _kind(layer: Layer) -> str:
    """By how many kernels a layer launches."""
    if any(mixer.is_recurrent for mixer in layer.mixers):
        return "recurrent"
    return "latent" if isinstance(layer.mixers[0], LatentAttention) else "attention"


def calibrated(name: str, what: str) -> Component:
    """A component that was measured once and for all."""
    size = int(calibration()[f"{name}_bytes"])
    return Component(
        name=name, planned_bytes=size, origin="calibrated", formula=f"{what}: {size} measured"
    )


@lru_cache(maxsize=1)
def calibration() -> Mapping[str, Any]:
    """What was measured on GPUs."""
    text = files(__package__).joinpath("calibration.json").read_text(encoding="utf-8")
    found: Mapping[str, Any] = json.loads(text)["cuda"]
    return found
