"""What vLLM allocates beside parameters and pool, and keeps.

Sources (vLLM 0.25.1 and 0.32.0): `layers/rotary_embedding/`, `v1/worker/gpu/states.py`,
`v1/worker/gpu/sample/{penalties,logit_bias,bad_words}.py`, `v1/worker/gpu/block_table.py`,
`v1/worker/gpu_model_runner.py: _make_buffer`.
"""

from math import prod

from tightfit.model.blocks.attention import Rope
from tightfit.model.blocks.base import Mixer
from tightfit.model.blocks.compressed_attention import CompressedAttention
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.mlp import MoE
from tightfit.model.blocks.per_layer_input import PerLayerInput
from tightfit.model.spec import ropes
from tightfit.planner.engines.vllm_setting import Setting, arithmetic
from tightfit.planner.plan import Component
from tightfit.planner.weights import held
from tightfit.units import MiB, cdiv, dtype_bytes, round_up

_SEGMENT = 2 * MiB
_MXFP4_WIDTH = 256
_UNSHARED = 10 * MiB
"""torch's allocator gives tensors of this size and more a segment of their own."""


def after_load(setting: Setting) -> Component:
    """Rope tables, and what the allocator loses by whole segments; vLLM logs both as weights."""
    tables = [
        rope_rows(rope) * rope.rotary_dim * setting.element_bytes for rope in ropes(setting.layers)
    ]
    sizes = setting.tensor_sizes()
    lost = sum(
        count * (round_up(size, _SEGMENT) - size)
        for size, count in sizes.items()
        if size >= _UNSHARED
    )
    absorbed, padded = _absorbed(setting), _padded_experts(setting)
    formula = "rope tables (positions x rotary_dim x b): " + " + ".join(map(str, tables))
    formula = formula if tables else "no rope tables"
    formula += f"; tensors of 10 MiB and more in segments of 2 MiB: {lost}"
    if absorbed:
        formula += f"; copies of kv_b_proj that latent attention absorbs: {absorbed}"
    if padded:
        formula += f"; experts padded to multiples of {_MXFP4_WIDTH} for their kernels: {padded}"
    return Component(
        name="weights_after_load",
        planned_bytes=sum(tables) + lost + absorbed + padded,
        origin="derived",
        formula=formula,
    )


def _padded_experts(setting: Setting) -> int:
    """`quantization/mxfp4.py: create_weights` of older versions rounds the width of experts up."""
    kinds = setting.kinds if setting.rules.pads_mxfp4 else ()
    widths = [
        setting.inner(layer)
        for layer in kinds
        if isinstance(layer.mlp, MoE) and layer.mlp.own_kernels
    ]
    if not widths:
        return 0
    width = widths[0]
    held_bytes = sum(
        dtype_bytes(weight.dtype or "BF16", prod(weight.rank_shape(setting.rank)))
        for weight in held(setting.spec, setting.rank)
        if weight.experts
    )
    return held_bytes * (round_up(width, _MXFP4_WIDTH) - width) // width


def _absorbed(setting: Setting) -> int:
    """`mla_attention.py: process_weights_after_loading`: views before 0.27, unless widened."""
    if not setting.rules.copies_absorbed and arithmetic(setting.spec) == "plain":
        return 0
    mixers = (mixer for layer in setting.layers for mixer in layer.mixers)
    elements = sum(
        m.absorbed_elements(setting.rank) for m in mixers if isinstance(m, LatentAttention)
    )
    return elements * setting.element_bytes


def rope_rows(rope: Rope) -> int:
    """Positions in a table; yarn and longrope start from the unscaled context."""
    scaling = rope.scaling or {}
    kind, rows = scaling.get("rope_type"), rope.max_position_embeddings
    factor = scaling.get("factor", 1.0)
    original = scaling.get("original_max_position_embeddings", rows)
    if kind in ("linear", "dynamic"):
        return int(rows * factor)
    if kind in ("yarn", "deepseek_yarn"):
        return int(original * factor)
    return rows + original if kind == "longrope" else rows


def persistent_buffers(setting: Setting) -> Component:
    """The state of requests between steps."""
    parts = _v1_buffers(setting) if setting.runner == "v1" else _v2_buffers(setting)
    parts |= _model_buffers(setting)
    return Component(
        name="persistent_buffers",
        planned_bytes=sum(parts.values()),
        origin="derived",
        formula=f"N = {setting.max_num_seqs}, M = {setting.max_num_batched_tokens}, "
        f"V = {setting.spec.vocab_size}; "
        + " + ".join(f"{name}: {size}" for name, size in parts.items()),
        inside_budget=setting.rules.charges_buffers,
    )


def _v2_buffers(setting: Setting) -> dict[str, int]:
    n, m, v = setting.max_num_seqs, setting.max_num_batched_tokens, setting.spec.vocab_size
    parts = {"inputs 13 x M": 13 * m, "lengths and starts 12 x N": 12 * n}
    if setting.spec.towers:
        parts["input embeddings M x H x b"] = setting.hidden_bytes
    if setting.samples:
        parts |= {
            "counts of output tokens 4 x N x V": 4 * n * v,
            "masks of prompt and grammar 2 x 4 x N x V / 32": 8 * n * cdiv(v, 32),
            "biased, allowed, stop and bad tokens 4 x N x (3200 + 1153)": 4 * n * (3200 + 1153),
        }
    if not setting.first_stage:
        parts["tensors from the stage before 2 x M x H x b"] = 2 * setting.hidden_bytes
    return parts


def _model_buffers(setting: Setting) -> dict[str, int]:
    """What models themselves keep between steps, for all tokens of one."""
    m, parts = setting.max_num_batched_tokens, {}
    topk = [_chosen(mixer) for mixer in setting.mixers]
    if any(topk):
        parts["tokens chosen by the indexer 4 x M x top_k"] = 4 * m * max(topk)
    extras = (block for layer in setting.kinds for block in layer.extras)
    sizes = [block.size for block in extras if isinstance(block, PerLayerInput)]
    if sizes:
        width = setting.spec.num_layers * max(sizes)
        parts[f"embeddings of each layer M x {width} x b"] = m * width * setting.element_bytes
    return parts


def _chosen(mixer: Mixer) -> int:
    """Tokens that a query sees, where an indexer chooses them."""
    if isinstance(mixer, CompressedAttention):
        return 0 if mixer.index is None else mixer.index.topk
    return (mixer.index_topk or 0) if isinstance(mixer, LatentAttention) else 0


def _v1_buffers(setting: Setting) -> dict[str, int]:
    n, m = setting.max_num_seqs, setting.max_num_batched_tokens
    parts = {
        "input embeddings M x H x b": setting.hidden_bytes,
        "inputs 24 x M": 24 * m,
        "block tables": _table_bytes(setting),
    }
    if not setting.first_stage:
        parts["tensors from the stage before 2 x M x H x b"] = 2 * setting.hidden_bytes
    return parts | {"lengths and starts 12 x N": 12 * n}


def block_tables(setting: Setting) -> Component:
    """The V2 runner makes them with the pool, when the budget has been spent.

    `initialize_kv_cache`: two tables per group, rows rounded to 128 tokens.
    """
    return Component(
        name="block_tables",
        planned_bytes=2 * _table_bytes(setting),
        origin="derived",
        formula=f"{len(setting.kv.groups)} groups x 2 x (N x blocks of {setting.max_model_len} "
        f"tokens x 4 + 8 x M) with N = {setting.max_num_seqs}",
        inside_budget=False,
    )


def _table_bytes(setting: Setting) -> int:
    blocks = cdiv(round_up(setting.max_model_len, 128), setting.kv.block_size)
    table = setting.max_num_seqs * blocks * 4 + setting.max_num_batched_tokens * 8
    return len(setting.kv.groups) * table
