"""What vLLM does not load of quantized checkpoints, or otherwise than one would think."""

from collections.abc import Iterator
from dataclasses import replace

from tightfit.errors import LayoutError, UnsupportedModelError
from tightfit.model.layout import Cut, Parallel, Rank, Weight
from tightfit.model.parameters import plain_parameters
from tightfit.model.quantization.recipe import Recipe
from tightfit.model.quantization.schemes import FP8, per_channel
from tightfit.model.spec import ModelSpec
from tightfit.model.stored.layouts import StoredLayout
from tightfit.model.stored.media import QUANTIZED, QUANTIZED_TOWERS
from tightfit.model.stored.quantized import MXFP4_BLOCK

_VERSION = (0, 32)
_FP8_CHANNELS = per_channel(FP8, static=False)
_WIDEST = 256
"""What kernels for MXFP4 round widths up to, at most (`fused_moe/oracle/mxfp4.py`)."""
_MARLIN_HIDDEN = 128
_MARLIN_GROUPS = (0, 32, 64, 128)
"""Hidden sizes and groups of experts that Marlin takes; 0 is one group for all inputs
(`marlin_utils.py: check_moe_marlin_supports_config`)."""


_WITHOUT_CACHE_SCALES = ("JambaForCausalLM",)
"""Their classes do not hand the quantization on to attention."""


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
    if recipe.placeholders and spec.architecture in _WITHOUT_CACHE_SCALES and not layout.uneven:
        raise UnsupportedModelError(
            f"sharding quantized {spec.architecture} is not supported: vLLM's attention of it has "
            "no room for the scales of a quantized cache",
            hint="vLLM loads the checkpoint as it is",
        )
    if layout.uneven:
        # Our own runtime has other limits, and says so when it loads.
        return
    if expert_parallel and any(_scales_all_experts(weight, recipe) for weight in _experts(spec)):
        raise LayoutError(
            f"with whole experts on each rank, it depends on vLLM's kernel for {recipe.name} "
            "whether a rank holds the input scales of all experts or of its own",
            hint="shard without --enable-expert-parallel",
        )
    if expert_parallel and spec.towers:
        raise UnsupportedModelError(
            f"sharding whole experts of quantized {spec.architecture} is not supported: what vLLM "
            "wants of them beside towers has not been verified",
            hint="leave out --enable-expert-parallel, or shard the unquantized model",
        )
    _check_towers(spec, recipe)
    for weight in plain_parameters(spec):
        _check_order(weight, recipe)
    _check_marlin(spec, recipe)
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


def _check_towers(spec: ModelSpec, recipe: Recipe) -> None:
    """Towers are left alone by name: vLLM applies the scheme to them as well.

    For want of names it compares those of AWQ's and GPTQ's modules with the tensors of a directory
    (`auto_awq.py: maybe_update_config`), which are fused in rank files.
    """
    if spec.towers and spec.architecture not in QUANTIZED:
        raise UnsupportedModelError(
            f"sharding quantized checkpoints of {spec.architecture} is not supported: what vLLM "
            "quantizes of them has not been verified",
            hint="shard the unquantized model, or a text model",
        )
    everywhere = replace(recipe, layers_only=False)
    for weight in (weight for tower in spec.towers for weight in tower.weights):
        source = weight.parts[0].source.removesuffix(".weight")
        forms = recipe.forms(weight)
        if forms == _FP8_CHANNELS and spec.architecture in QUANTIZED_TOWERS:
            continue
        if forms is not None:
            raise UnsupportedModelError(
                f"sharding {spec.architecture} with {source!r} in {recipe.name} is not supported: "
                "its quantized tower has not been verified in vLLM",
                hint="quantize the model again, and ignore its towers",
            )
        if everywhere.forms(weight) is not None:
            raise UnsupportedModelError(
                f"quantization_config ({recipe.name}) does not list {source!r} among the modules "
                "that are not quantized, and vLLM would not find that out from rank files",
                hint="add the towers to its modules_to_not_convert, or to what it ignores",
            )


def _check_order(weight: Weight, recipe: Recipe) -> None:
    """Rows that change places, or begin inside a tensor, need scales or words of their own."""
    for part in weight.parts:
        starts = (part.first_row, part.run_rows, part.run_stride)
        for form in recipe.forms(weight) or ():
            split = form.rows > 1 and any(start % form.rows for start in starts)
            if split or (part.paired and (form.rows > 1 or form.transposed)):
                raise UnsupportedModelError(
                    f"sharding {weight.name!r} in {recipe.name} is not supported: engines hold its "
                    f"rows in another order, and {form.rows} of {part.source!r} share a "
                    f"{'word or a scale' if form.rows > 1 else 'column'}",
                    hint="quantize the model again without this layer, or with a scale for each "
                    "output channel",
                )


def _check_marlin(spec: ModelSpec, recipe: Recipe) -> None:
    """Elsewhere vLLM repacks AWQ's and GPTQ's experts while it loads them (`moe_wna16.py`)."""
    for weight in _experts(spec):
        for form in recipe.forms(weight) or ():
            scales = form.kind == "scales" and form.transposed and weight.cut is Cut.OUTPUT
            if not scales or weight.columns is None:
                continue
            if weight.columns % _MARLIN_HIDDEN or form.columns not in _MARLIN_GROUPS:
                raise UnsupportedModelError(
                    f"sharding experts in {recipe.name} is not supported for a hidden size of "
                    f"{weight.columns}: vLLM's Marlin kernels want a multiple of "
                    f"{_MARLIN_HIDDEN}, in groups of 32, 64 or 128, and for others it repacks the "
                    "experts while it loads them",
                    hint="vLLM loads the checkpoint as it is",
                )


def loading_notes(spec: ModelSpec, parallel: Parallel) -> tuple[str, ...]:
    """What an engine does with the files that nobody would expect, and why it may."""
    recipe = spec.quantization
    if not isinstance(recipe, Recipe) or not recipe.padded_experts:
        return ()
    rank = Rank(parallel=parallel)
    for weight in _experts(spec):
        if weight.cut is Cut.INPUT and weight.columns is not None:
            held = replace(recipe, padded_experts=MXFP4_BLOCK).created(weight)
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
