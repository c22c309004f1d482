"""Adapt a model's quantization to a layout, as an engine does when it loads."""

from dataclasses import replace

from tightfit.model.layout import Parallel
from tightfit.model.parameters import plain_parameters
from tightfit.model.spec import ModelSpec


def fit_quantization(spec: ModelSpec, parallel: Parallel) -> ModelSpec:
    """The model with smaller blocks of scales where those of the checkpoint do not divide.

    vLLM does so since 0.32, and only for experts; without it such layouts are refused.
    """
    if spec.quantization is None:
        return spec
    fitted = spec.quantization.fitted(plain_parameters(spec), parallel)
    return spec if fitted is spec.quantization else replace(spec, quantization=fitted)
