"""The tensors that vLLM makes room for where a checkpoint is quantized.

Those are what its loader fills before kernels rearrange anything (`create_weights` of each scheme):
the values and scales of a matrix, fused and cut like it, and placeholders beside attention layers.
"""

from collections.abc import Iterator
from dataclasses import replace

from tightfit.errors import LayoutError, UnsupportedModelError
from tightfit.model.layout import Cut, Parallel, Piece, Rank, RankTensor, Weight
from tightfit.model.parameters import plain_parameters
from tightfit.model.quantization.forms import Form
from tightfit.model.quantization.recipe import Recipe
from tightfit.model.spec import ModelSpec
from tightfit.model.stored.layouts import StoredLayout

_VERSION = (0, 32)
_WIDEST = 256
"""What kernels round widths up to, at most (`fused_moe/oracle/mxfp4.py`)."""
_MXFP4_BLOCK = 32
"""Ranks get whole blocks of this width of gpt-oss's experts (`models/gpt_oss.py`).

Kernels want wider ones, each another; the loader puts ours into the corner of what those made room
for, which is full of zeros.
"""


def check_quantization(
    spec: ModelSpec, layout: StoredLayout, *, expert_parallel: bool = False
) -> None:
    """Refuse what the engine of a layout does not load.

    Raises:
        UnsupportedModelError: it has no such quantization, or its state is not modelled.
        LayoutError: ranks with whole experts hold something else on each device.
    """
    recipe = spec.quantization
    if recipe is None:
        return
    if spec.towers:
        raise UnsupportedModelError(
            f"sharding quantized checkpoints of {spec.architecture} is not supported: what vLLM "
            "quantizes of its towers has not been verified",
            hint="shard the unquantized model, or a text model",
        )
    if layout.uneven:
        raise UnsupportedModelError(
            f"the layout {layout.name} has no quantized layers",
            hint="shard for vLLM: --layout vllm-0.32",
        )
    if not isinstance(recipe, Recipe):
        raise UnsupportedModelError(
            f"sharding checkpoints in {recipe.name} is not supported",
            hint="plan it with `tightfit plan`",
        )
    if recipe.unsharded is not None:
        raise UnsupportedModelError(
            f"sharding this {recipe.name} checkpoint is not supported: {recipe.unsharded}",
            hint="vLLM loads the checkpoint as it is",
        )
    if expert_parallel and any(_scales_all_experts(weight, recipe) for weight in _experts(spec)):
        raise LayoutError(
            f"with whole experts on each rank, it depends on vLLM's kernel for {recipe.name} "
            "whether a rank holds the input scales of all experts or of its own",
            hint="shard without --enable-expert-parallel",
        )
    reason = recipe.refusal(_VERSION)
    if reason is not None:
        raise UnsupportedModelError(
            f"vLLM would not load {recipe.name}: {reason}",
            hint="quantize the model again, in a scheme that vLLM has",
        )


def _experts(spec: ModelSpec) -> Iterator[Weight]:
    return (weight for weight in plain_parameters(spec) if weight.experts)


def _scales_all_experts(weight: Weight, recipe: Recipe) -> bool:
    """Whether it is ModelOpt's NVFP4 (`modelopt.py: use_global_sf`)."""
    return any(form.kind == "weight_scale_2" for form in recipe.forms(weight) or ())


def loading_notes(spec: ModelSpec, parallel: Parallel) -> tuple[str, ...]:
    """What an engine does with the files that nobody would expect, and why it may."""
    recipe = spec.quantization
    if not isinstance(recipe, Recipe) or not recipe.padded_experts:
        return ()
    rank = Rank(parallel=parallel)
    for weight in _experts(spec):
        if weight.cut is Cut.INPUT and weight.columns is not None:
            held = replace(recipe, padded_experts=_MXFP4_BLOCK).created(weight)
            width = next(2 * tensor.rank_shape(rank)[-1] for _, tensor in held)
            hidden = sum(part.rows for part in weight.parts)
            if width % _WIDEST or hidden % _WIDEST:
                return (
                    f"kernels of {recipe.name} want other sizes than {width} (a rank's share of "
                    f"an expert) or {hidden} (the hidden size): vLLM makes room for more, fills "
                    "the rest with zeros, and logs a warning for each such tensor",
                )
            break
    return ()


def quantized_tensors(
    recipe: Recipe, weight: Weight, rank: Rank, dtype: str
) -> Iterator[RankTensor]:
    """What stands for a weight on a rank of a model that computes in `dtype`.

    Raises:
        LayoutError: the layout, or the scheme, does not divide this weight.
        UnsupportedModelError: parts of the weight are quantized differently.
    """
    if recipe.padded_experts:
        recipe = replace(recipe, padded_experts=_MXFP4_BLOCK)
    for form, held in recipe.created(weight):
        # Boxes see sources without dimensions that mean nothing to an engine.
        flat = held if form is None else replace(held, stored_shape=None)
        tensor = flat.rank_tensor(rank, dtype)
        yield tensor if form is None else _as_held(form, held, tensor, dtype)


def _as_held(form: Form, held: Weight, tensor: RankTensor, dtype: str) -> RankTensor:
    if not form.stored:
        tensor = replace(tensor, dtype=held.held_dtype(dtype), pieces=())
    if form.scalar:
        tensor = replace(tensor, shape=())
    if held.transposed:
        tensor = _turned(tensor)
    if held.experts and not form.rows and form.columns is None and tensor.shape[-1] == 1:
        pieces = tuple(replace(piece, at=piece.at[:-1]) for piece in tensor.pieces)
        tensor = replace(tensor, shape=tensor.shape[:-1], pieces=pieces)
    return replace(tensor, fill=form.fill, optional=form.optional)


def _turned(tensor: RankTensor) -> RankTensor:
    """The engine holds `columns, rows`, as the checkpoint does."""

    def swapped(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return (*sizes[:-2], sizes[-1], sizes[-2])

    pieces = tuple(
        replace(piece, at=swapped(piece.at), transposed=not piece.transposed)
        for piece in tensor.pieces
    )
    return replace(tensor, shape=swapped(tensor.shape), pieces=pieces)


def placeholders(recipe: Recipe, attention: str, dtype: str) -> Iterator[RankTensor]:
    """What an attention layer has until it is loaded: scales of a quantized cache."""
    if attention.endswith(_LATENT) and not recipe.latent_placeholders:
        return
    for form in recipe.placeholders:
        shape = () if form.scalar else (form.count,)
        zeros = tuple(0 for _ in shape)
        yield RankTensor(
            name=f"{attention}.{form.kind}",
            parameter=f"{attention}.{form.kind}",
            dtype=form.dtype or dtype,
            shape=shape,
            pieces=tuple(
                Piece(source=name, source_shape=shape, start=zeros, shape=shape, at=zeros)
                for name in _sources(attention, form.kind)
            ),
            fill=form.fill,
            optional=True,
        )


def _sources(attention: str, kind: str) -> Iterator[str]:
    """Where checkpoints may have it (`base_config.py: get_cache_scale_mapper`)."""
    module = attention.removesuffix(_LATENT).removesuffix(".attn")
    one, _, rest = kind.partition("_")
    yield f"{attention}.{kind}"
    yield f"{module}.{kind}"
    yield f"{module}.{one}_proj.{kind}"
    if rest == "scale":
        yield f"{module}.{one}_proj.output_scale"
    if kind == "k_scale":
        yield f"{module}.kv_scale"
    if kind == "prob_scale":
        yield f"{module}.prob_output_scale"


_LATENT = ".mla_attn.mla_attn"
