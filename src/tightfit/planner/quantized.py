"""Plans of what `tightfit quantize` would write of a model, in place of what the model is.

An engine sees a checkpoint with a quantization of its own then, as if it had been written. What
engines quantize by themselves while they load is not of this kind.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from tightfit.errors import UsageError
from tightfit.model.sources import Tensor
from tightfit.model.spec import ModelSpec
from tightfit.planner.options import PlanOptions
from tightfit.planner.weights import checkpoint_bytes

if TYPE_CHECKING:
    from tightfit.model.quantization.written import Wish


def wish_of(options: PlanOptions) -> "Wish | None":
    """What `quantize` is to make of the model; None if nothing.

    Raises:
        UsageError: a group size or a format without a scheme that has one, or beside a recipe.
    """
    scheme, recipe = options.quantization, options.quantization_recipe
    details = {
        "--quantization-group-size": options.quantization_group_size,
        "--quantization-format": options.quantization_format,
    }
    given = [f"{flag} {value}" for flag, value in details.items() if value is not None]
    if scheme is None and recipe is None and not given:
        return None
    from tightfit.model.quantization.written import COMPRESSED_TENSORS, SCHEMES, Choice, Wish

    if recipe is not None:
        if not isinstance(recipe, Wish):
            raise UsageError(f"{recipe!r:.80} is no recipe", hint="give a Wish")
        if scheme is not None:
            given.insert(0, f"--quantization {scheme}")
        if given:
            raise UsageError(f"{given[0]} beside a recipe", hint="a recipe says all of it")
        return recipe
    if scheme not in SCHEMES:
        if given:
            raise UsageError(
                f"{given[0]} belongs to a scheme of `tightfit quantize`",
                hint="--quantization " + "|".join(SCHEMES),
            )
        return None
    choice = Choice(
        scheme=scheme,
        group_size=options.quantization_group_size,
        format=options.quantization_format or COMPRESSED_TENSORS,
    )
    return Wish(default=choice)


def as_written(spec: ModelSpec, options: PlanOptions) -> ModelSpec:
    """The model of the checkpoint that is planned: quantized, if the options say so.

    Raises:
        UsageError: as `wish_of`, or the model is quantized already, in another way.
        UnsupportedModelError: nothing of it can be quantized, or engines could not load it.
    """
    wish = wish_of(options)
    return spec if wish is None else _quantized(spec, wish, options.quantization)


@lru_cache(maxsize=64)
def _quantized(spec: ModelSpec, wish: "Wish", scheme: str | None) -> ModelSpec:
    from tightfit.model.quantization.online import quantize_spec

    return quantize_spec(spec, scheme or wish.label, wish=wish)


# A sweep asks for the same again and again.
_promised = lru_cache(maxsize=8)(checkpoint_bytes)


def stored_bytes(
    spec: ModelSpec, options: PlanOptions, tensors: Mapping[str, Tensor] | None = None
) -> int:
    """Bytes of all tensors of the checkpoint that is planned.

    Args:
        spec: the model that there is.
        options: of the plan.
        tensors: of its checkpoint, if its headers were read; else the dtype is config.json's.

    Raises:
        LayoutError, UsageError, UnsupportedModelError: as `as_written`.
    """
    written = as_written(spec, options)
    if written is spec:
        if tensors is None:
            return _promised(spec)
        return sum(tensor.nbytes for tensor in tensors.values())
    from tightfit.model.quantization.sizes import cache_scale_bytes, written_bytes

    wish = wish_of(options)
    assert wish is not None
    # `quantize` does not take tensors with other names than the model's.
    if tensors is None or spec.alias is not None:
        return _promised(written) + cache_scale_bytes(spec, wish)
    return written_bytes(spec, wish, tensors)
