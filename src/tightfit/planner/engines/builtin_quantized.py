"""What the built-in runtime needs while it uses a quantized matrix, beside what a plain one needs.

The formulas are read off `runtime.quantized` and `runtime.inputs`, which import their constants
from here.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod

from tightfit.model.layout import Rank, Weight
from tightfit.model.parameters import plain_parameters
from tightfit.model.quantization.forms import Forms
from tightfit.model.quantization.recipe import Inputs, Recipe
from tightfit.model.spec import ModelSpec

DECODED_ELEMENTS = 2**18
"""Elements of a quantized matrix that are decoded at once, unless one row alone has more."""
ROUNDED_TOKENS = 128
"""Tokens whose inputs are rounded, or multiplied as integers, at once."""
_DECODED_BYTES = 16
"""For each element that is decoded: codes and values in float32, and what unpacks them."""
_ROUNDED_BYTES = 16
"""For each input that is rounded: its value, scaled value and result in float32, and one more."""
_INT8_INPUT_BYTES = 9
_INT8_OUTPUT_BYTES = 8
"""int32 products, and those as floats."""


@lru_cache(maxsize=64)
def decoding_bytes(spec: ModelSpec, rank: Rank, b: int, tokens: int) -> int:
    """The most that a quantized matrix of a rank needs while `tokens` go through it.

    Args:
        spec: the model.
        rank: which rank of which layout.
        b: bytes of an element of activations.
        tokens: of a step.
    """
    recipe = spec.quantization
    if not isinstance(recipe, Recipe):
        return 0
    most = 0
    for weight in plain_parameters(spec):
        forms = recipe.forms(weight)
        if forms is not None:
            most = max(most, _needed(weight, forms, recipe.inputs(weight), rank, b, tokens))
    return most


def multiplies_integers(forms: Forms, inputs: Inputs | None) -> bool:
    """Whether a matrix is multiplied as int8 with int8 inputs, and so is never decoded."""
    by_kind = {form.kind: form for form in forms}
    weight, scale = by_kind.get("weight"), by_kind.get("weight_scale")
    if inputs is None or weight is None or scale is None or "input_scale" in by_kind:
        return False
    whole = not inputs.group_size and not scale.columns
    return inputs.dtype == "I8" and weight.dtype == "I8" and whole


def int4_group(forms: Forms, inputs: Inputs | None, part_rows: Sequence[int]) -> int | None:
    """The group size of a matrix that torch's kernel for int4 and bfloat16 takes, or None.

    It wants multiples of 16 outputs, which it rearranges 64 at a time.
    """
    by_kind = {form.kind: form for form in forms}
    packed = by_kind.get("weight_packed") or by_kind.get("qweight")
    scale = by_kind.get("weight_scale") or by_kind.get("scales")
    if packed is None or scale is None or inputs is not None:
        return None
    words = packed.dtype == "I32" and 8 in (packed.columns, packed.rows)
    *first, last = part_rows
    rows = last % 16 == 0 and all(count % 64 == 0 for count in first)
    return scale.columns if words and rows and scale.columns in _INT4_GROUPS else None


_INT4_GROUPS = (32, 64, 128, 256)
_ZERO_POINTS = ("weight_zero_point", "qzeros")


@lru_cache(maxsize=64)
def repacked_bytes(spec: ModelSpec, rank: Rank, b: int) -> int:
    """What torch's kernel for int4 wants beside what a checkpoint holds: zero points as floats.

    Args:
        spec: the model.
        rank: which rank of which layout.
        b: bytes of an element of activations; the kernel is for bfloat16.
    """
    recipe = spec.quantization
    if not isinstance(recipe, Recipe):
        return 0
    total = 0
    for weight in plain_parameters(spec):
        forms = recipe.forms(weight)
        if forms is None:
            continue
        group = int4_group(forms, recipe.inputs(weight), weight.part_rows(rank))
        if group is not None:
            *experts, rows, columns = weight.rank_shape(rank)
            zeros = prod(experts) * rows * columns // group
            held = any(form.kind in _ZERO_POINTS and not form.dropped for form in forms)
            total += zeros * b - (zeros // 2 if held else 0)
    return total


def _needed(
    weight: Weight, forms: Forms, inputs: Inputs | None, rank: Rank, b: int, tokens: int
) -> int:
    *_, rows, columns = weight.rank_shape(rank)
    some = min(tokens, ROUNDED_TOKENS)
    if multiplies_integers(forms, inputs):
        return some * max(_INT8_INPUT_BYTES * columns, columns + _INT8_OUTPUT_BYTES * rows)
    decoded = min(rows, max(1, DECODED_ELEMENTS // columns))
    needed = decoded * (columns * _DECODED_BYTES + tokens * b)
    if inputs is not None:
        needed = max(needed, some * columns * _ROUNDED_BYTES) + tokens * columns * b
    return needed
