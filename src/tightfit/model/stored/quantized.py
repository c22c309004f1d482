"""The tensors that vLLM makes room for where a checkpoint is quantized.

Those are what its loader fills before kernels rearrange anything (`create_weights` of each scheme):
the values and scales of a matrix, fused and cut like it, and placeholders beside attention layers.
"""

from collections.abc import Iterator
from dataclasses import replace

from tightfit.model.layout import Piece, Rank, RankTensor, Weight
from tightfit.model.quantization.forms import Form
from tightfit.model.quantization.recipe import Recipe

MXFP4_BLOCK = 32
"""Ranks get whole blocks of this width of gpt-oss's experts (`models/gpt_oss.py`).

Kernels want wider ones, each another; the loader puts ours into the corner of what those made room
for, which is full of zeros.
"""


def quantized_tensors(
    recipe: Recipe, weight: Weight, rank: Rank, dtype: str
) -> Iterator[RankTensor]:
    """What stands for a weight on a rank of a model that computes in `dtype`.

    Raises:
        LayoutError: the layout, or the scheme, does not divide this weight.
        UnsupportedModelError: parts of the weight are quantized differently.
    """
    for form, held in in_blocks(recipe).created(weight):
        # Boxes see sources without dimensions that mean nothing to an engine.
        flat = held if form is None else replace(held, stored_shape=None)
        tensor = flat.rank_tensor(rank, dtype)
        yield tensor if form is None else _as_held(form, held, tensor, dtype)


def in_blocks(recipe: Recipe) -> Recipe:
    """The recipe with experts as wide as files have them."""
    return replace(recipe, padded_experts=MXFP4_BLOCK) if recipe.padded_experts else recipe


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
