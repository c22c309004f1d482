"""What a layer of the built-in runtime needs on a CPU while it works, beside the residual stream.

The formulas are read off `runtime.models`. Letters are those of `builtin_memory`.
"""

from collections.abc import Iterable, Iterator, Mapping

from tightfit.model.blocks.attention import Attention, head_axes
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.mamba import Mamba2
from tightfit.model.blocks.mlp import DenseMLP, MoE
from tightfit.model.layout import Axis, Rank
from tightfit.model.parameters import stage_layers, stage_parameters
from tightfit.model.quantization.recipe import Recipe
from tightfit.model.spec import Layer, ModelSpec, ropes
from tightfit.planner.devices import multiplies_in_tiles
from tightfit.planner.engines.builtin_states import mamba_stages
from tightfit.units import dtype_bytes

GATHER_TOKENS = 8192
"""Cached tokens that a group of decoding sequences gathers at once, unless one alone has more."""
BIAS_ELEMENTS = 2**20
"""Elements of a mask: longer prompts attend in chunks of queries."""
SCORE_ELEMENTS = 2**21
"""Elements of explicit attention scores, where PyTorch's kernel for CPUs cannot be used."""
FP8_ELEMENTS = 2**20
"""Keys or values that are put into an fp8 cache at once, or taken out, on a CPU."""
PACKED_QUERIES = 64
"""PyTorch puts keys and values into the order of AMX for so many queries or more."""
EXPERT_ROWS = 512
"""Tokens that an expert takes at once."""

Stages = Mapping[str, int]
"""Peaks in bytes, of which a layer has the largest."""


def layer_stages(
    spec: ModelSpec, rank: Rank, dtype: str, tokens: int, seqs: int, length: int
) -> Iterator[Stages]:
    """Those of every kind of layer."""
    b, tiled = dtype_bytes(dtype), multiplies_in_tiles(dtype)
    # While the MLP works, what attention gave waits beside it.
    beside = tokens * spec.hidden_size * b if spec.parallel_residual else 0
    for layer in dict.fromkeys(layers_of(spec, rank)):
        for stages in (
            _attention(spec, layer, rank, b, tokens, seqs, length, tiled),
            _mlp(spec, layer, rank, b, tokens),
        ):
            yield {name: size + beside for name, size in stages.items()}


def layers_of(spec: ModelSpec, rank: Rank) -> tuple[Layer, ...]:
    """The layers of a rank's pipeline stage."""
    return tuple(spec.layers[i] for i in stage_layers(spec, rank))


def windows(layers: Iterable[Layer]) -> set[int | None]:
    """The distinct windows of attention, each of which has masks of its own."""
    return {
        getattr(mixer, "window", None)
        for layer in layers
        for mixer in layer.mixers
        if not mixer.is_recurrent
    }


def rope_bytes(spec: ModelSpec, b: int, rows: int) -> int:
    """So many rows of every rope table."""
    return rows * sum(
        rope.rotary_dim * (b if rope.dtype is None else dtype_bytes(rope.dtype))
        for rope in ropes(spec.layers)
    )


def decoded_latents_bytes(spec: ModelSpec, rank: Rank, b: int) -> int:
    """Quantized `kv_b_proj` of latent attention, which is decoded once, to be absorbed."""
    recipe, total = spec.quantization, 0
    absorbed = any(isinstance(mixer, LatentAttention) and mixer.absorbed for mixer in spec.mixers)
    if not absorbed or not isinstance(recipe, Recipe):
        return total
    for weight in stage_parameters(spec, rank):
        if weight.name.endswith(".kv_b_proj.weight") and recipe.forms(weight) is not None:
            rows, columns = weight.rank_shape(rank)
            total += rows * columns * b
    return total


def _attention(
    spec: ModelSpec,
    layer: Layer,
    rank: Rank,
    b: int,
    tokens: int,
    seqs: int,
    length: int,
    tiled: bool,
) -> Stages:
    (mixer,) = layer.mixers
    if isinstance(mixer, Mamba2):
        return mamba_stages(spec, mixer, rank, b, tokens, seqs)
    gathered = max(length, min(seqs * length, GATHER_TOKENS)) * b
    masks = min(tokens * length, BIAS_ELEMENTS) * (b + 2)
    if isinstance(mixer, LatentAttention):
        return _latent(spec.hidden_size, mixer, rank, b, tokens, gathered, masks, length)
    assert isinstance(mixer, Attention)
    hidden = spec.hidden_size
    q, kv = (axis.span(rank)[1] for axis in head_axes(mixer))
    always = tokens * (hidden + q + 2 * kv) * b
    if mixer.softcap is not None or mixer.sinks:
        masks += _scores(q // mixer.head_dim, tokens, length) + tokens * 2 * q * b
    if mixer.names.by_head:
        # The projection's own order and the usual one.
        always += tokens * (q + 2 * kv) * b
    reordered = 0
    if tiled and min(tokens, BIAS_ELEMENTS // length) >= PACKED_QUERIES:
        # PyTorch's kernel (FlashAttentionKernel.cpp) does so for every query head.
        reordered = always + tokens * q * b + 2 * (q + kv) * length * b + masks
    return {
        "rope (H + Q + 2KV + (Q + KV)/2) x T x b": always + tokens * (q + kv) * b // 2,
        "keys and values in the order of AMX 2(Q + KV) x L x b": reordered,
        "gathered keys and values": always + tokens * q * b + 2 * kv * gathered + masks,
        "prompt attention (H + 3Q + 4KV) x T x b": always + tokens * 2 * (q + kv) * b,
        "output projection (2H + 2Q + 2KV) x T x b": always + tokens * (q + hidden) * b,
    }


def _scores(heads: int, tokens: int, length: int) -> int:
    """Explicit scores, in float32, and their softmax."""
    return max(min(tokens * length * heads, SCORE_ELEMENTS), length * heads) * 8


def _latent(
    hidden: int,
    mixer: LatentAttention,
    rank: Rank,
    b: int,
    tokens: int,
    gathered: int,
    masks: int,
    length: int,
) -> Stages:
    """Latent attention: its input, the small projections and the queries live throughout."""
    heads = mixer.heads(1).span(rank)[1]
    small = (mixer.q_lora_rank or 0) + mixer.latent_size
    always = hidden + 2 * small + heads * mixer.qk_head_dim
    if not mixer.absorbed:
        size = heads * mixer.qk_head_dim
        made = heads * (mixer.qk_nope_head_dim + mixer.v_head_dim)
        return {
            f"expanded latents, {heads} heads of {mixer.qk_head_dim}": tokens
            * (always + made + 6 * size)
            * b
            + 2 * size * gathered
            + masks
        }
    rows, results = heads * mixer.latent_size, heads * mixer.kv_lora_rank
    values = heads * mixer.v_head_dim
    attending = always + rows + results
    both = rows + results + heads * mixer.qk_nope_head_dim
    return {
        f"absorbed queries, {heads} heads of {mixer.latent_size}": tokens * b * (always + both),
        f"gathered latents, {heads} heads of {mixer.latent_size}": (
            tokens * b * attending + (mixer.latent_size + mixer.kv_lora_rank) * gathered + masks
        ),
        f"prompt attention to latents, {heads} heads of {mixer.latent_size}": (
            tokens * b * (attending + rows)
            + 2 * mixer.latent_size * length * b
            + masks
            + _scores(heads, tokens, length)
        ),
        f"values of latents, {heads} heads of {mixer.v_head_dim}": (
            tokens * b * (always + rows + 2 * results + 2 * values + hidden)
        ),
    }


def absorbed_stages(hidden: int, mixer: LatentAttention, rank: Rank, b: int, tokens: int) -> Stages:
    """Latent attention on a GPU, whose kernels find the latents in the cache."""
    heads = mixer.heads(1).span(rank)[1]
    small = 2 * ((mixer.q_lora_rank or 0) + mixer.latent_size)
    always = hidden + small + heads * mixer.qk_head_dim
    rows, results = heads * mixer.latent_size, heads * mixer.kv_lora_rank
    return {
        f"attention to latents, {heads} heads of {mixer.latent_size}": (
            tokens * b * (always + rows + results)
        ),
        f"values of latents, {heads} heads of {mixer.v_head_dim}": (
            tokens * b * (always + results + 2 * heads * mixer.v_head_dim + hidden)
        ),
    }


def _mlp(spec: ModelSpec, layer: Layer, rank: Rank, b: int, tokens: int) -> Stages:
    """The input of the MLP lives throughout."""
    hidden = spec.hidden_size
    if isinstance(layer.mlp, DenseMLP):
        return dense_stages(layer.mlp, rank, b, tokens, hidden)
    assert isinstance(layer.mlp, MoE)
    moe = layer.mlp
    inner = _width(moe.intermediate_size, spec, rank)
    rows = min(tokens, EXPERT_ROWS)
    routing = routing_bytes(moe, hidden, b, tokens)
    # Clamped gates and ups are copies.
    made = 6 if moe.activation == "swigluoai" else 3
    found = {
        "experts (2H + routing) x T x b, and rows of one expert": 2 * tokens * hidden * b
        + routing
        + rows * (2 * hidden + made * inner) * b
    }
    for mlp in (moe.shared, *layer.extras):
        if isinstance(mlp, DenseMLP):
            for name, size in dense_stages(mlp, rank, b, tokens, hidden).items():
                found[f"{mlp.module}, beside H x T x b of experts, {name}"] = (
                    size + tokens * hidden * b
                )
    return found


def routing_bytes(moe: MoE, hidden: int, b: int, tokens: int) -> int:
    """Scores of all experts, and the chosen ones."""
    ranked = 8 if moe.correction_bias is not None or moe.routing.groups > 1 else 0
    routing = tokens * (moe.num_experts * (b + 8 + ranked) + moe.top_k * 12)
    if moe.router_dtype is not None:
        routing += tokens * hidden * dtype_bytes(moe.router_dtype)
    return routing


def dense_stages(mlp: DenseMLP, rank: Rank, b: int, tokens: int, hidden: int) -> Stages:
    """Those of an MLP for all tokens."""
    inner = Axis(label="intermediate_size", units=mlp.intermediate_size).span(rank)[1]
    made = 3 if mlp.gated else 2
    return {
        f"MLP (H + {made}I) x T x b with I = {inner}": tokens * (hidden + made * inner) * b,
        f"down projection (2H + I) x T x b with I = {inner}": tokens * (2 * hidden + inner) * b,
    }


def _width(intermediate_size: int, spec: ModelSpec, rank: Rank) -> int:
    """The rank's share of an expert's width, with what a scheme fills it up to."""
    recipe = spec.quantization
    padded = recipe.padded_experts if isinstance(recipe, Recipe) else 0
    axis = Axis(label="moe_intermediate_size", units=intermediate_size, padded=padded)
    return axis.span(rank)[1]
