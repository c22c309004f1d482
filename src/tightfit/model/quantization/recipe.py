"""The quantization that a checkpoint declares: which of its matrices have which forms."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import gcd

from tightfit.errors import LayoutError, UnsupportedModelError
from tightfit.model.layout import Axis, Cut, Parallel, Part, Rank, Weight
from tightfit.model.quantization.base import Quantization
from tightfit.model.quantization.forms import Form, Forms, created, stored
from tightfit.model.quantization.matching import Names


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """How the inputs of a layer are rounded as they come: to `I8`, `F8_E4M3` or `F4_E2M1`."""

    dtype: str
    group_size: int = 0
    """Inputs that share a scale; 0 for all of a token."""
    exponents: bool = False
    """Scales are powers of two: MXFP8."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rule:
    """The forms of the modules in `names`, or of all where `everything`; None leaves them alone."""

    forms: Forms | None
    names: Names = field(default_factory=Names)
    everything: bool = False
    inputs: Inputs | None = None
    """Also where scales of inputs are among the forms, which then take the place of computed ones.
    """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe(Quantization):
    """Rules by name first, then the one for everything; `ignored` names come before them."""

    name: str
    rules: tuple[Rule, ...]
    ignored: Names = field(default_factory=Names)
    head: str | None = None
    """Name of the output layer's weight, where lists decide about it as well."""
    layers_only: bool = False
    """Only decoder layers (and the head) are ever quantized, whatever is not ignored."""
    experts_only: bool = False
    splits_experts: bool = True
    """Experts that a plain checkpoint holds in one tensor have a tensor each."""
    padded_experts: int = 0
    """A rank's width of experts is a multiple of this, if TP does not divide them evenly."""
    expert_block: int | None = None
    """Rows and columns of a block of the experts' scales, where an engine makes them smaller."""
    cuts_fused: bool = False
    """An engine lets shares of fused matrices end within a block of scales."""
    placeholders: tuple[Form, ...] = ()
    """What an engine has beside each attention layer until its weights are loaded."""
    latent_placeholders: bool = False
    """Beside layers of latent attention as well."""
    optional_sources: tuple[str, ...] = ()
    unsharded: str | None = None
    """Why no rank files can be made of it, though vLLM loads it."""
    refused: tuple[tuple[tuple[int, int], tuple[int, int], str], ...] = ()
    """First version, version after the last, and why those versions do not load it."""

    def apply(self, weight: Weight) -> Iterator[Weight]:
        """The checkpoint's tensors."""
        forms = self.forms(weight)
        if forms is None:
            yield weight
        else:
            yield from stored(self._split(weight), forms)

    def loaded(self, weight: Weight) -> Iterator[Weight]:
        """The engine's tensors, and its placeholders beside attention layers."""
        for _, tensor in self.created(weight):
            yield tensor
        if weight.name.endswith(_FUSED) and isinstance(weight.where, int):
            module = weight.name.removesuffix(_FUSED)
            for form in self.placeholders:
                part = Part(source=f"{module}.attn.{form.kind}", rows=form.count)
                yield Weight(
                    name=part.source,
                    parts=(part,),
                    where=weight.where,
                    dtype=form.dtype,
                    dropped=True,
                )

    def created(self, weight: Weight) -> Iterator[tuple[Form | None, Weight]]:
        """The engine's tensors with their forms, which what is not quantized lacks.

        Raises:
            LayoutError, UnsupportedModelError: as `apply`.
        """
        forms = self.forms(weight)
        weight = self.padded(weight)
        if forms is None:
            yield None, weight
        else:
            if weight.experts and self.expert_block:
                forms = tuple(_in_blocks(form, self.expert_block) for form in forms)
            if self.cuts_fused and len(weight.parts) > 1 and not weight.experts:
                forms = tuple(replace(form, local=form.ragged) for form in forms)
            yield from created(self._split(weight), forms)

    def padded(self, weight: Weight) -> Weight:
        """The weight, of experts with the widths that ranks have of them."""
        if not self.padded_experts or not weight.experts:
            return weight
        return _padded(weight, self.padded_experts)

    def forms(self, weight: Weight) -> Forms | None:
        """The forms of a weight, or None if it stays as it is.

        Raises:
            UnsupportedModelError: parts of one weight have different ones.
        """
        if not (weight.linear or weight.name == self.head) or weight.columns is None:
            return None
        inside = isinstance(weight.where, int) or weight.name == self.head
        if self.layers_only and not inside:
            return None
        if self.experts_only and not weight.experts:
            return None
        modules = [
            part.source.removesuffix(".weight").replace("{expert}", "0")
            for part in self._split(weight).parts
        ]
        found = {self.module_forms(module) for module in modules}
        if len(found) > 1:
            raise UnsupportedModelError(
                f"{weight.name} is made of {' and '.join(modules)}, which quantization_config "
                "treats differently",
                hint="engines hold them as one matrix: quantize or ignore all of them",
            )
        return found.pop()

    def fitted(self, weights: Iterable[Weight], parallel: Parallel) -> "Recipe":
        """With smaller blocks if they do not divide a rank's width of experts.

        (vLLM 0.32's `fused_moe/oracle/fp8.py: refine_fp8_moe_block_shape`: not below 32.)
        """
        if parallel.expert_parallel:
            return self
        rank = Rank(parallel=parallel).for_experts()
        for weight in weights:
            if not weight.experts or weight.cut is not Cut.INPUT or weight.input_axis is None:
                continue
            block = _block(self.forms(weight) or ())
            try:
                width = weight.input_axis.span(rank)[1]
            except LayoutError:
                return self
            smaller = gcd(block, width, sum(part.rows for part in weight.parts))
            return replace(self, expert_block=smaller) if width % block and smaller >= 32 else self
        return self

    def refusal(self, version: tuple[int, int]) -> str | None:
        """The reason among `refused` that covers the version."""
        for first, end, reason in self.refused:
            if first <= version < end:
                return reason
        return None

    def module_forms(self, module: str) -> Forms | None:
        """The forms of a module by its name, as in the checkpoint."""
        rule = self._rule(module)
        return None if rule is None else rule.forms

    def inputs(self, weight: Weight) -> Inputs | None:
        """How the inputs of a quantized weight are rounded; None if they are not."""
        part = self._split(weight).parts[0]
        rule = self._rule(part.source.removesuffix(".weight").replace("{expert}", "0"))
        return None if rule is None else rule.inputs

    def _rule(self, module: str) -> Rule | None:
        if module in self.ignored:
            return None
        for rule in self.rules:
            if module in rule.names:
                return rule
        return next((rule for rule in self.rules if rule.everything), None)

    def _split(self, weight: Weight) -> Weight:
        return split_experts(weight) if self.splits_experts else weight


def split_experts(weight: Weight) -> Weight:
    """A weight of stacked experts as if each had tensors of its own."""
    if not weight.stacked:
        return weight
    module, _, _ = weight.parts[0].source.removesuffix(".weight").rpartition(".")
    if not module.endswith("experts"):
        # Granite's `input_linear`: loaders look for them where others have them.
        module += ".experts"
    gated = ("gate_proj", "up_proj") if len(weight.parts) > 1 else ("up_proj",)
    names = gated if weight.name.endswith("w13_weight") else ("down_proj",)
    parts = tuple(
        replace(part, source=f"{module}.{{expert}}.{name}.weight", first_row=0, source_rows=0)
        for part, name in zip(weight.parts, names, strict=True)
    )
    return replace(weight, parts=parts, stacked=False, transposed=False)


_FUSED = ".qkv_proj.weight"


def _block(forms: Forms) -> int:
    return next((form.rows for form in forms if form.ragged and form.rows == form.columns), 1)


def _in_blocks(form: Form, block: int) -> Form:
    return replace(form, rows=block, columns=block) if form.ragged else form


def _padded(weight: Weight, multiple: int) -> Weight:
    def pad(axis: Axis | None) -> Axis | None:
        return axis and replace(axis, padded=multiple * axis.unit_rows)

    parts = tuple(replace(part, axis=pad(part.axis)) for part in weight.parts)
    return replace(weight, parts=parts, input_axis=pad(weight.input_axis))
