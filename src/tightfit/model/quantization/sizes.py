"""The bytes of the checkpoint that `quantize` writes, from the headers of the one that it reads."""

from collections import Counter
from collections.abc import Mapping
from math import prod

from tightfit.model.blocks.attention import Attention
from tightfit.model.quantization.forms import stored_forms
from tightfit.model.quantization.recipe import split_experts
from tightfit.model.quantization.written import Wish, decide, matrices, module_name
from tightfit.model.sources import Tensor
from tightfit.model.spec import ModelSpec
from tightfit.units import dtype_bytes


def written_bytes(spec: ModelSpec, wish: Wish, tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors of the quantized checkpoint.

    What is not quantized keeps its dtype, whatever config.json says, and scales that have no dtype
    of their own get that of their matrix.

    Args:
        spec: the model, unquantized.
        wish: what the user wants.
        tensors: of its checkpoint.

    Raises:
        LayoutError: groups or words do not divide a matrix.
        UsageError: a rule matches nothing.
    """
    decisions = decide(spec, wish)
    total, seen = 0, set[str]()
    taken: dict[str, int] = {}
    for weight in matrices(spec):
        split = split_experts(weight)
        choice = decisions[module_name(split.parts[0].source)]
        if choice is None:
            continue
        forms = [tensor for _, tensor in stored_forms(split, choice.forms)]
        for number, part in enumerate(weight.parts):
            if split.parts[number].source in seen:
                # Several parts of one tensor, such as a fused one of queries, keys and values.
                continue
            seen.add(split.parts[number].source)
            names = [part.source.format(expert=e) for e in range(max(weight.experts, 1))]
            taken |= {name: tensors[name].nbytes for name in names}
            for dtype, count in Counter(tensors[name].dtype for name in names).items():
                for tensor in forms:
                    elements = prod(tensor.source_shape(tensor.parts[number]))
                    total += count * dtype_bytes(tensor.dtype or dtype, elements)
    total += sum(tensor.nbytes for tensor in tensors.values()) - sum(taken.values())
    return total + cache_scale_bytes(spec, wish)


def cache_scale_bytes(spec: ModelSpec, wish: Wish) -> int:
    """Of the scales of a quantized cache: one for keys and one for values, in float32."""
    mixers = [mixer for layer in spec.layers for mixer in layer.mixers]
    count = sum(isinstance(mixer, Attention) for mixer in mixers) if wish.kv_cache else 0
    return count * 2 * dtype_bytes("F32")
