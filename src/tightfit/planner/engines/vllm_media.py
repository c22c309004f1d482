"""Encoders under vLLM: which are built, the budget, what is profiled, and its memory.

vLLM measures an encoder by running one batch of the largest items of one modality through it, and
keeps the embeddings while it runs the decoder's largest step. Sources: `multimodal/
encoder_budget.py`, `v1/core/encoder_cache_manager.py: compute_mm_encoder_budget`,
`v1/worker/gpu/mm/encoder_runner.py: profile_encoder_cache`, and the models' own files for what is
alive at the peak. The newer model runner profiles on the first pipeline stage only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tightfit.errors import UsageError
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.base import Item, Tower
from tightfit.model.towers.vit import uncut
from tightfit.planner.options import PlanOptions
from tightfit.units import cdiv

DEFAULT_LIMIT = 999
"""Items of a modality per prompt (`MultiModalConfig.get_limit_per_prompt`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Bytes, and how they come about."""

    nbytes: int
    formula: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderProfile:
    """What vLLM runs through an encoder when it starts."""

    tower: Tower
    budget_tokens: int
    """Embeddings that one step may compute, and that the cache may hold."""
    item: Item
    items: int
    """Copies of the item in the batch."""


def limit(tower: Tower, options: PlanOptions, modality: str) -> int:
    """Items of a modality that a prompt may have.

    Raises:
        UsageError: `limit_mm_per_prompt` has something else than a count, or sizes with one.
    """
    if options.language_model_only:
        return 0
    most = tower.most_items.get(modality, DEFAULT_LIMIT)
    given = options.limit_mm_per_prompt.get(modality)
    if isinstance(given, Mapping):
        given = given.get("count")
    if given is None:
        return most
    return min(most, _whole(modality, "count", given, 0))


def sizes(options: PlanOptions) -> dict[str, dict[str, int]]:
    """The limits of width, height, number of frames and length that the user gave.

    Raises:
        UsageError: one is no whole number above zero.
    """
    found: dict[str, dict[str, int]] = {}
    for modality, given in options.limit_mm_per_prompt.items():
        if isinstance(given, Mapping):
            found[modality] = {
                str(name): _whole(modality, str(name), value, 1)
                for name, value in given.items()
                if name != "count" and value is not None
            }
    return found


def built(spec: ModelSpec, options: PlanOptions) -> ModelSpec:
    """The model with the towers and the weights that vLLM builds.

    A tower whose modalities all have a limit of 0 is left out; `mm_encoder_tp_mode="data"` makes
    its weights whole on every rank, where the model supports that.

    Raises:
        UsageError: `limit_mm_per_prompt` is malformed.
    """
    if not spec.towers:
        return spec
    towers = []
    for tower in spec.towers:
        if not any(limit(tower, options, modality) for modality in tower.modalities):
            continue
        weights = tuple(w for w in tower.weights if w.name not in tower.unbuilt)
        if is_data_parallel(tower, options):
            weights = tuple(map(uncut, weights))
        towers.append(replace(tower, weights=weights))
    return replace(spec, towers=tuple(towers), wraps_decoder=True)


def is_data_parallel(tower: Tower, options: PlanOptions) -> bool:
    """Whether ranks share the items of a batch, and not the width of the encoder."""
    return tower.data_parallel and options.mm_encoder_tp_mode == "data"


def encoder_profile(
    spec: ModelSpec,
    options: PlanOptions,
    *,
    max_model_len: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
) -> EncoderProfile | None:
    """The budget, the modality with the most embeddings per item, and how many items are run.

    None when nothing is: no towers, limits of 0, or `skip_mm_profiling`.

    Raises:
        UsageError: `limit_mm_per_prompt` or `mm_processor_kwargs` is malformed.
    """
    if options.skip_mm_profiling:
        return None
    found: list[tuple[Item, Tower]] = []
    for tower in spec.towers:
        active = [m for m in tower.modalities if limit(tower, options, m)]
        if tower.profiled and active:
            largest = tower.media.profiled(
                options.mm_processor_kwargs, max_model_len, sizes(options), active
            )
            found += ((item, tower) for item in largest if item.tokens > 0)
    if not found:
        return None
    item, tower = max(found, key=lambda pair: (pair[0].tokens, pair[0].modality))
    budget = max(max_num_batched_tokens, item.tokens)
    per_prompt = max(1, min(limit(tower, options, item.modality), max_model_len // item.tokens))
    requests = max_num_seqs
    if options.enable_chunked_prefill is False:
        requests = min(requests, max_num_batched_tokens // item.tokens)
    items = max(1, min(budget // item.tokens, requests * per_prompt))
    return EncoderProfile(tower=tower, budget_tokens=budget, item=item, items=items)


def least_step(spec: ModelSpec, options: PlanOptions, max_model_len: int) -> int:
    """Tokens of the largest item that a step has to take whole; 0 if there is none.

    (`engine/arg_utils.py: _get_min_mm_batched_tokens`, which raises the default to it.)

    Raises:
        UsageError: `limit_mm_per_prompt` or `mm_processor_kwargs` is malformed.
    """
    found = 0
    for tower in spec.towers:
        if tower.whole_items:
            items = tower.media.profiled(
                options.mm_processor_kwargs, max_model_len, sizes(options), tower.modalities
            )
            found = max(found, *(item.tokens for item in items))
    return found


def encoder_cache(profile: EncoderProfile, element_bytes: int) -> Figure:
    """The embeddings of the profiled batch, which stay while the decoder is profiled."""
    tokens, size = profile.items * profile.item.embeddings, profile.tower.output_size
    return Figure(
        nbytes=tokens * size * element_bytes,
        formula=f"{profile.items} x {profile.item.embeddings} embeddings x {size} features "
        f"x {element_bytes} B",
    )


def encoder_run(
    profile: EncoderProfile, options: PlanOptions, element_bytes: int, tensor_parallel_size: int
) -> Figure:
    """What is alive at the peak of the profiled batch: its inputs, and the widest layer.

    Sizes are of one rank. Per position of the encoder a layer holds, in features: attention its
    input, the normalized input and the output (3 x hidden), queries, keys, values and the context
    (4 x heads x head_dim), and for rotary positions the queries and keys before and after (4 more)
    with a table of head_dim; an MLP three times the hidden size, and its inner features before and
    after the activation, twice as many before it with a gate. The outputs of early mergers stay
    until the end. The projector holds its input and twice all outputs. What is alive was counted
    on vLLM's own modules, with tensors that have no data.
    """
    tower, item = profile.tower, profile.item
    ranks, items = tensor_parallel_size, profile.items
    if is_data_parallel(tower, options):
        ranks, items = 1, cdiv(items, tensor_parallel_size)
    copies = (8 if tower.rotary else 4) + tower.copies
    attention = tower.num_heads * tower.head_dim // ranks * copies
    inner = tower.intermediate_size // ranks * (3 if tower.gated else 2)
    table = tower.head_dim if tower.rotary else 0
    widest = 3 * tower.hidden_size + max(attention, inner) + table + tower.held
    outputs = item.embeddings * tower.output_size
    early = outputs * (tower.mergers - 1) // tower.mergers
    layers = item.patches * widest + early
    projector = item.patches * (tower.hidden_size + table + tower.held) + 2 * outputs
    part = "attention" if attention > inner else "MLP"
    merged = f" + {items} x {early} features of early mergers" if early else ""
    return Figure(
        nbytes=(profile.items * item.inputs + items * max(layers, projector)) * element_bytes,
        formula=(
            f"({profile.items} x {item.inputs} inputs + {items} x {item.patches} patches x "
            f"{widest} features at the {part}{merged}) x {element_bytes} B"
            if layers >= projector
            else f"({profile.items} x {item.inputs} inputs + {items} x {projector} features at the "
            f"projector) x {element_bytes} B"
        ),
    )


def _whole(modality: str, name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**31:
        raise UsageError(
            f"--limit-mm-per-prompt has {name} = {str(value)[:40]!r} for {modality!r}",
            hint='write {"image": 2}, or {"image": {"count": 2, "width": 512, "height": 512}}',
        )
    return value
