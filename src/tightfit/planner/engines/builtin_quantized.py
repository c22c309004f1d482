"""What the built-in runtime needs while it uses a quantized matrix, beside what a plain one needs.

The formulas are read off `runtime.quantized`, which imports its constants from here.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod

from tightfit.model.layout import Rank, Weight
from tightfit.model.parameters import stage_parameters
from tightfit.model.quantization.forms import Forms
from tightfit.model.quantization.recipe import Inputs, Recipe
from tightfit.model.spec import ModelSpec

DECODED_ELEMENTS = 2**18
"""Elements of a quantized matrix that are decoded at once, unless one row alone has more."""
ROUNDED_TOKENS = 128
"""Tokens whose inputs are rounded, or multiplied as integers, at once."""
CUDA_DECODED_ELEMENTS = 2**25
"""On a GPU, elements that are decoded at once for many tokens."""
CUDA_DECODED_ROWS = 128
"""Rows are decoded in multiples of this."""
CUDA_DECODED_TOKENS = 256
"""More tokens than these go through matrices that are decoded."""
CUDA_SPLIT_PROGRAMS = 512
"""Programs of a matrix, at most, where several of them share a tile of the outputs."""
CUDA_SPLIT_ELEMENTS = 2**21
"""What those leave for each other, in float32, at most."""
CUDA_EXPERT_ELEMENTS = 2**27
"""On a GPU, elements of what experts give at once, unless one token alone has more."""
CUDA_EXPERT_BLOCK = 128
"""Assignments of tokens to one expert that a program takes, at most."""
_DECODED_BYTES = 16
"""For each element that is decoded: codes and values in float32, and what unpacks them."""
_ROUNDED_BYTES = 16
"""For each input that is rounded: its value, scaled value and result in float32, and one more."""
_INT8_INPUT_BYTES = 9
_INT8_OUTPUT_BYTES = 8
"""int32 products, and those as floats."""


@lru_cache(maxsize=64)
def decoding_bytes(spec: ModelSpec, rank: Rank, b: int, tokens: int) -> int:
    """The most that a quantized matrix of a rank needs on a CPU while `tokens` go through it.

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
    for weight in stage_parameters(spec, rank):
        forms = recipe.forms(weight)
        if forms is None:
            continue
        most = max(most, _needed(weight, forms, recipe.inputs(weight), rank, b, tokens))
    return most


@lru_cache(maxsize=64)
def gpu_workspaces(spec: ModelSpec, rank: Rank, b: int, tokens: int) -> Mapping[str, int]:
    """What each quantized matrix of a rank needs on a GPU while `tokens` go through it.

    Args:
        spec: the model.
        rank: which rank of which layout.
        b: bytes of an element of activations.
        tokens: of a step.

    Returns:
        The most of all layers, by the name of the matrix within its layer, such as
        `mlp.down_proj.weight`. Experts that kernels take are counted by `expert_bytes` instead.
    """
    recipe = spec.quantization
    found: dict[str, int] = {}
    if not isinstance(recipe, Recipe):
        return found
    for weight in stage_parameters(spec, rank):
        forms = recipe.forms(weight)
        if forms is None or (weight.experts and b == 2):
            continue
        # In float32 it is torch that decodes them.
        of = _needed_on_gpu if b == 2 else _needed
        needed = of(weight, forms, recipe.inputs(weight), rank, b, tokens)
        _, inside, name = weight.name.partition(f"{spec.names.layers}.")
        name = name.partition(".")[2] if inside else weight.name
        found[name] = max(found.get(name, 0), needed)
    return found


def expert_tokens(top_k: int, hidden: int, inner: int) -> int:
    """Tokens that a GPU's experts take at once.

    Args:
        top_k: experts of a token.
        hidden: outputs of an expert.
        inner: its rank's share of the inner size.
    """
    return max(1, CUDA_EXPERT_ELEMENTS // (top_k * (hidden + inner)))


def expert_bytes(
    tokens: int, *, num_experts: int, top_k: int, hidden: int, inner: int, b: int, rounds: bool
) -> int:
    """What a GPU's experts need beside their inputs and outputs.

    That is the inner activations and the output of each assignment, places of assignments in
    blocks, and inputs that are rounded.

    Args:
        tokens: of a step.
        num_experts: of a layer.
        top_k: experts of a token.
        hidden: outputs of an expert.
        inner: its rank's share of the inner size.
        b: bytes of an element of activations.
        rounds: whether inputs are rounded.
    """
    some = min(tokens, expert_tokens(top_k, hidden, inner))
    count = some * top_k
    places = 4 * (count + min(count, num_experts) * CUDA_EXPERT_BLOCK)
    rounded = (some * (hidden * b + 4) + count * (inner * b + 4)) if rounds else 0
    return count * (hidden + inner) * b + 2 * places + rounded


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
    for weight in stage_parameters(spec, rank):
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


@lru_cache(maxsize=64)
def gpu_repacked_bytes(spec: ModelSpec, rank: Rank) -> int:
    """What kernels on a GPU want beside what a checkpoint holds.

    That is zero points of 4 bits as bytes, and a float32 scale for each output where all of a
    matrix have the same.

    Args:
        spec: the model.
        rank: which rank of which layout.
    """
    recipe = spec.quantization
    if not isinstance(recipe, Recipe):
        return 0
    total = 0
    for weight in stage_parameters(spec, rank):
        *experts, rows, columns = weight.rank_shape(rank) if weight.columns else (0, 0)
        for form in recipe.forms(weight) or () if columns % 32 == 0 else ():
            if form.kind in _ZERO_POINTS and not form.dropped and form.rows == 8:
                zeros = prod(experts) * rows * columns // (form.columns or columns)
                total += zeros - zeros // 2
            elif form.kind in _WHOLE_SCALES and not form.rows:
                total += 4 * prod(experts) * rows
    return total


_WHOLE_SCALES = ("weight_scale", "weight_scale_2", "weight_global_scale")


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


def _needed_on_gpu(
    weight: Weight, forms: Forms, inputs: Inputs | None, rank: Rank, b: int, tokens: int
) -> int:
    """Rounded inputs, and what is decoded for many tokens or shared among programs for few."""
    *_, rows, columns = weight.rank_shape(rank)
    shared, decoded = 4 * CUDA_SPLIT_ELEMENTS, 0
    if tokens > CUDA_DECODED_TOKENS:
        some = max(CUDA_DECODED_ROWS, CUDA_DECODED_ELEMENTS // columns)
        decoded = min(rows, some) * columns * b
    if inputs is None:
        return max(shared, decoded)
    if _multiplies_codes(forms, inputs):
        # A GPU without fp8 decodes, and rounds nothing.
        return max(tokens * (columns + 4) + shared, decoded)
    return tokens * columns * b + max(shared, decoded)


def _multiplies_codes(forms: Forms, inputs: Inputs) -> bool:
    """Whether a GPU multiplies a matrix in 8 bits, with inputs in as many."""
    by_kind = {form.kind: form for form in forms}
    weight, scale = by_kind.get("weight"), by_kind.get("weight_scale")
    if weight is None or scale is None or inputs.group_size:
        return False
    return weight.dtype == inputs.dtype and not scale.columns and not scale.ragged
