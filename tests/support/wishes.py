"""What users may wish of `quantize`: every scheme in every format, and recipes for any model."""

from collections.abc import Mapping
from dataclasses import replace

from tightfit.model.layout import Weight
from tightfit.model.quantization.recipe import split_experts
from tightfit.model.quantization.written import (
    _FORMS,
    GROUPED,
    Choice,
    Wish,
    matrices,
    module_name,
)
from tightfit.model.spec import ModelSpec

CHOICES: Mapping[str, Choice] = {
    choice.label: choice
    for choice in (
        Choice(scheme=scheme, format=form, group_size=32 if scheme in GROUPED else None)
        for form, scheme in _FORMS
    )
}
"""Groups of 32 divide all tiny models."""
WISHES: Mapping[str, Wish] = {label: Wish(default=choice) for label, choice in CHOICES.items()}
ONE_OF_EACH_FORMAT = ("fp8-channel", "fp8-block (fp8)", "w4a16 g32 (gptq)", "w4a16-asym g32 (awq)")


def shallow(spec: ModelSpec) -> ModelSpec:
    """The model with one layer of each kind, which has all names but those of further layers."""
    return replace(spec, layers=tuple(dict.fromkeys(spec.layers)))


def mixed(spec: ModelSpec) -> Wish:
    """int4 for MLPs and experts, fp8 for the rest and the head, and the last layer left alone."""
    last = rf"{spec.names.layers}\.{spec.num_layers - 1}\."
    rules: list[tuple[str, Choice | None]] = [(last, None)] if spec.num_layers > 1 else []
    if any(weight.name == f"{spec.names.head}.weight" for weight in matrices(spec)):
        rules.append((rf"^{spec.names.head}$", CHOICES["fp8-channel"]))
    mlps = [weight for weight in matrices(spec) if _is_of_mlp(weight)]
    if mlps:
        parts = [part for weight in mlps for part in split_experts(weight).parts]
        ends = {module_name(part.source).rpartition(".")[2] for part in parts}
        rules.append((rf"\.({'|'.join(sorted(ends))})$", CHOICES["w4a16 g32"]))
    return Wish(default=CHOICES["fp8-channel"], rules=tuple(rules))


def _is_of_mlp(weight: Weight) -> bool:
    return isinstance(weight.where, int) and (
        weight.experts > 0 or "mlp" in weight.name or "feed_forward" in weight.name
    )
