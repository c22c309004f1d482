"""Adapt a model's quantization to a layout, as an engine does when it loads."""

from dataclasses import replace

from tightfit.model.layout import Parallel
from tightfit.model.parameters import plain_parameters
from tightfit.model.quantization.recipe import Recipe
from tightfit.model.spec import ModelSpec

_BLOCKS = ("fp8 (block", "deepseek_v4_fp8 (block")


def cut_fused(spec: ModelSpec) -> ModelSpec:
    """The model with fused matrices whose shares may end within a block of fp8 scales.

    vLLM checks no others then (`layers/linear.py: _maybe_allow_fp8_block_shape_mismatch`).
    """
    recipe = spec.quantization
    if not isinstance(recipe, Recipe) or not recipe.name.startswith(_BLOCKS):
        return spec
    return replace(spec, quantization=replace(recipe, cuts_fused=True))


def fit_quantization(spec: ModelSpec, parallel: Parallel) -> ModelSpec:
    """The model with smaller blocks of scales where those of the checkpoint do not divide.

    vLLM does so since 0.32, and only for experts; without it such layouts are refused.
    """
    if spec.quantization is None:
        return spec
    fitted = spec.quantization.fitted(plain_parameters(spec), parallel)
    return spec if fitted is spec.quantization else replace(spec, quantization=fitted)
