"""What `tightfit quantize` makes of a model: which of its matrices get which scheme.

A `Wish` is what a user says: a scheme for everything, others by pattern, and what to leave alone.
`written` turns it into the recipe of the checkpoint that will be written, which `plan` weighs and
`quantize` carries out; `section` is what that checkpoint's config then says.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from tightfit.errors import UnsupportedModelError, UsageError
from tightfit.model.blocks.base import Place
from tightfit.model.cache import StateCache
from tightfit.model.layout import Rank, Weight
from tightfit.model.parameters import plain_parameters
from tightfit.model.quantization import compressed_tensors, modelopt, schemes
from tightfit.model.quantization.forms import Forms
from tightfit.model.quantization.leaving import ignoring, short_names
from tightfit.model.quantization.matching import Names, may_explode
from tightfit.model.quantization.recipe import Recipe, Rule, split_experts
from tightfit.model.spec import ModelSpec

GROUP_SIZE = 128
"""Inputs that share a scale in integer schemes for weights alone, unless the user says otherwise.

That is compressed-tensors' presets' as well.
"""
GROUP_SIZES = (-1, 32, 64, 128)
"""vLLM's `marlin_utils.py: MARLIN_SUPPORTED_GROUP_SIZES`."""
COMPRESSED_TENSORS = "compressed-tensors"


class ChoiceError(UsageError):
    """No such choice; `key` is the field that is wrong."""

    def __init__(self, key: str, message: str, *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.key = key


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A scheme, as it is written for one matrix.

    The group size is -1 for whole rows, and None for that of `GROUP_SIZE`, however it is given.

    Raises:
        ChoiceError: no such scheme or format, or a group size where there are no groups.
    """

    scheme: str
    group_size: int | None = None
    format: str = COMPRESSED_TENSORS

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            # What vLLM calls `fp8` while it loads, three of these write.
            close = [name for name in SCHEMES if name.startswith(f"{self.scheme}-")]
            raise ChoiceError(
                "scheme",
                f"there is no scheme {self.scheme!r}",
                hint=f"did you mean {' or '.join(close)}?"
                if close
                else "schemes: " + ", ".join(SCHEMES),
            )
        size = self.group_size
        if size is not None and self.scheme not in GROUPED:
            raise ChoiceError(
                "group_size",
                f"a group size of {size} with the scheme {self.scheme}",
                hint=f"a size, or -1 for whole rows, belongs to {', '.join(GROUPED)}",
            )
        if size is not None and size not in GROUP_SIZES:
            raise ChoiceError(
                "group_size",
                f"groups of {size} inputs, for which engines have no kernels",
                hint="group sizes: " + ", ".join(map(str, GROUP_SIZES)) + " (-1 for whole rows)",
            )
        if self.format not in FORMATS:
            raise ChoiceError(
                "format",
                f"there is no format {self.format!r}",
                hint="formats: " + ", ".join(FORMATS),
            )
        if (self.format, self.scheme) not in _FORMS:
            fine = [scheme for format, scheme in _FORMS if format == self.format]
            raise ChoiceError(
                "format",
                f"the format {self.format!r} does not have the scheme {self.scheme}",
                hint=f"{self.format} has {', '.join(fine)}",
            )
        if size == GROUP_SIZE:
            # What is the same has to be equal.
            object.__setattr__(self, "group_size", None)

    @property
    def forms(self) -> Forms:
        """What stands for a matrix."""
        return _FORMS[self.format, self.scheme](self.group)

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None for all of a row, also where there are no groups."""
        if self.scheme not in GROUPED:
            return None
        size = GROUP_SIZE if self.group_size is None else self.group_size
        return size if size > 0 else None

    @property
    def label(self) -> str:
        """What tables call it: `w4a16 g128`."""
        name = f"{self.scheme} g{self.group}" if self.group else self.scheme
        return name if self.format == COMPRESSED_TENSORS else f"{name} ({self.format})"


_Maker = Callable[[int | None], Forms]

_FORMS: Mapping[tuple[str, str], _Maker] = {
    (COMPRESSED_TENSORS, "fp8-tensor"): lambda _: schemes.per_tensor(
        schemes.FP8, static=False, scale_dtype=None
    ),
    (COMPRESSED_TENSORS, "fp8-channel"): lambda _: schemes.per_channel(schemes.FP8, static=False),
    (COMPRESSED_TENSORS, "fp8-block"): lambda _: schemes.fp8_block(
        128, 128, scale="weight_scale", dtype=None
    ),
    (COMPRESSED_TENSORS, "int8"): lambda _: schemes.per_channel("I8", static=False),
    (COMPRESSED_TENSORS, "w8a16"): lambda g: schemes.pack_quantized(8, g, symmetric=True),
    (COMPRESSED_TENSORS, "w4a16"): lambda g: schemes.pack_quantized(4, g, symmetric=True),
    (COMPRESSED_TENSORS, "w4a16-asym"): lambda g: schemes.pack_quantized(4, g, symmetric=False),
    (COMPRESSED_TENSORS, "nvfp4"): lambda _: schemes.nvfp4(activations=True),
    (COMPRESSED_TENSORS, "nvfp4a16"): lambda _: schemes.nvfp4(activations=False),
    (COMPRESSED_TENSORS, "mxfp4"): lambda _: schemes.mxfp4(),
    (COMPRESSED_TENSORS, "mxfp8"): lambda _: schemes.mxfp8(),
    ("fp8", "fp8-block"): lambda _: schemes.fp8_block(128, 128, scale="weight_scale_inv"),
    ("gptq", "w4a16"): lambda g: schemes.gptq(4, g, symmetric=True),
    ("gptq", "w8a16"): lambda g: schemes.gptq(8, g, symmetric=True),
    ("awq", "w4a16-asym"): lambda g: schemes.awq(4, g, zero_point=True),
}
_PLACEHOLDERS: Mapping[str, Forms] = {
    COMPRESSED_TENSORS: compressed_tensors.PLACEHOLDERS,
    "fp8": modelopt.PLACEHOLDERS,
}
SCHEMES = tuple(scheme for format, scheme in _FORMS if format == COMPRESSED_TENSORS)
FORMATS = tuple(dict.fromkeys(format for format, _ in _FORMS))
GROUPED = ("w8a16", "w4a16", "w4a16-asym")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a user wants: of `rules` (pattern, and scheme or None) the first that matches counts.

    Patterns are regular expressions that may match anywhere in the name of a module. What stays as
    it is by default, such as the output layer, is quantized only where a rule says so.
    """

    default: Choice | None
    rules: tuple[tuple[str, Choice | None], ...] = ()
    kv_cache: bool = False
    """Scales for keys and values in fp8."""

    @property
    def format(self) -> str:
        """The one that all have.

        Raises:
            UsageError: they have several, or one that does not mix schemes; or nothing is to be
                quantized.
        """
        formats = {choice.format for choice in self.choices}
        if len(formats) != 1:
            raise UsageError(
                f"a recipe with the formats {', '.join(sorted(formats))}"
                if formats
                else "a recipe that quantizes nothing",
                hint="a checkpoint has one format; only compressed-tensors mixes schemes"
                if formats
                else "give a scheme",
            )
        (format,) = formats
        if format != COMPRESSED_TENSORS and len(self.choices) > 1:
            raise UsageError(
                f"the format {format} has one scheme and one group size, and the recipe has "
                f"{self.label}",
                hint="leave the others alone (keep: true), or choose --format compressed-tensors",
            )
        return format

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All schemes that may occur."""
        found = (self.default, *(choice for _, choice in self.rules))
        return tuple(dict.fromkeys(choice for choice in found if choice is not None))

    @property
    def label(self) -> str:
        """What tables call it."""
        return " + ".join(choice.label for choice in self.choices)


Decisions = Mapping[str, Choice | None]
"""By module; `experts.0` stands for all experts."""


def decide(spec: ModelSpec, wish: Wish) -> Decisions:
    """What becomes of every matrix that can be quantized.

    Raises:
        UsageError: a scheme is for nothing, or a pattern is no regular expression, or could take
            forever.
    """
    kept = frozenset(_kept(spec))
    patterns = [(compiled(pattern), choice) for pattern, choice in wish.rules]
    found: dict[str, Choice | None] = {}
    for weight in matrices(spec):
        by_default = weight.linear and isinstance(weight.where, int)
        for part in split_experts(weight).parts:
            module = module_name(part.source)
            decision = wish.default if by_default and module not in kept else None
            for pattern, choice in patterns:
                if pattern.search(module):
                    decision = choice
                    break
            found[module] = decision
    for pattern, choice in patterns:
        if choice is not None and not any(map(pattern.search, found)):
            raise UsageError(
                f"the pattern {pattern.pattern!r} matches nothing of {spec.architecture} that "
                "can be quantized",
                hint=f"names look like {next(iter(found), 'none')!r}",
            )
    return found


def matrices(spec: ModelSpec) -> Iterator[Weight]:
    """Every matrix that can be quantized: linear layers, and the output layer if it is its own."""
    head = f"{spec.names.head}.weight"
    return (w for w in plain_parameters(spec) if w.linear or w.name == head)


def module_name(source: str) -> str:
    """The module of a tensor; of experts the first."""
    return source.removesuffix(".weight").replace("{expert}", "0")


def written(spec: ModelSpec, wish: Wish) -> Recipe:
    """The recipe of the checkpoint that is written.

    Raises:
        UsageError: as `decide` and `Wish.format`; or engines hold matrices as one, or experts
            together, that are to be quantized differently; or nothing is left to quantize.
        UnsupportedModelError: a matrix is stored in a way that quantized checkpoints have no form
            for, or engines have no such experts.
    """
    decisions = decide(spec, wish)
    head = f"{spec.names.head}.weight"
    recipe = Recipe(
        name=wish.label,
        rules=tuple(
            Rule(
                forms=choice.forms,
                names=Names(exact=[name for name, one in decisions.items() if one == choice]),
            )
            for choice in wish.choices
        ),
        head=head if decisions.get(spec.names.head) is not None else None,
        placeholders=_PLACEHOLDERS.get(wish.format, ()),
    )
    check_together(spec, decisions)
    for weight in matrices(spec):
        if decisions[module_name(split_experts(weight).parts[0].source)] is not None:
            _check_storage(weight)
    return recipe


def held_together(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Modules that engines hold as one, or as experts of one layer, by the name that they get."""
    found: dict[str, dict[str, None]] = {}
    for weight in matrices(spec):
        name = weight.name.rpartition(".")[0] if weight.experts else weight.name
        modules = (module_name(part.source) for part in split_experts(weight).parts)
        found.setdefault(name, {}).update(dict.fromkeys(modules))
    return {name: tuple(modules) for name, modules in found.items()}


def check_together(spec: ModelSpec, decisions: Decisions) -> None:
    """What engines hold as one is quantized in one way, and so are all matrices of experts.

    Raises:
        UsageError: it is not, or nothing is quantized at all.
        UnsupportedModelError: engines have no such experts.
    """
    for weight in matrices(spec):
        module = module_name(split_experts(weight).parts[0].source)
        choice = decisions[module]
        if weight.experts and choice is not None and choice.scheme == "fp8-tensor":
            # vLLM asserts it (`compressed_tensors_moe_w8a8_fp8.py`, 0.25 to 0.32).
            raise UnsupportedModelError(
                f"{module} in {choice.label}: vLLM multiplies experts whose weights have one "
                "scale only with static scales of activations, which this scheme has not",
                hint="use fp8-channel, or leave experts as they are (--ignore '\\.experts\\.')",
            )
    together = held_together(spec).values()
    split = [parts for parts in together if len({decisions[part] for part in parts}) > 1]
    if split:
        raise _split(split, decisions)
    if not any(decisions.values()):
        raise UsageError(
            f"nothing of {spec.architecture} would be quantized",
            hint="its matrices were all left alone; name them with a rule",
        )


def _split(groups: Collection[tuple[str, ...]], decisions: Decisions) -> UsageError:
    """What would be torn apart, layers that are alike in one, and the pattern that does not."""
    said = {}
    for parts in groups:
        labels = {part: c.label if (c := decisions[part]) else "as it is" for part in parts}
        said[", ".join(f"{short_names([part])[0]} {label}" for part, label in labels.items())] = 0
    whole = [part for parts in groups for part in parts]
    rest = {name for name, choice in decisions.items() if choice is not None} - set(whole)
    return UsageError(
        f"engines hold as one what would be quantized differently: {'; '.join(said)}",
        hint=f"leave all of it alone: --ignore '{ignoring(whole, rest)}'; or let patterns match "
        "all parts, or none",
    )


def _check_storage(weight: Weight) -> None:
    alternating = weight.stacked and any(p.axis and p.axis.unit_rows > 1 for p in weight.parts)
    if alternating or weight.stored_shape is not None or (weight.transposed and not weight.stacked):
        kind = (
            "rows of gate and up alternate"
            if alternating
            else "its experts are one long matrix"
            if weight.stored_shape is not None
            else "it is stored as [inputs, outputs]"
        )
        raise UnsupportedModelError(
            f"{weight.parts[0].source} cannot be quantized: {kind}, for which quantized "
            "checkpoints have no form that engines load",
            hint="leave such layers alone (--ignore)",
        )


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of a rule.

    Raises:
        UsageError: it is no regular expression, or could take forever to match.
    """
    if may_explode(pattern):
        raise UsageError(
            f"the pattern {pattern[:80]!r} could take forever to match: its repeats are nested, "
            "or many",
            hint="write it without groups that repeat what repeats; or as several patterns",
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(
            f"{pattern!r} is not a regular expression: {error}", hint="correct the pattern"
        ) from None


def _kept(spec: ModelSpec) -> Iterator[str]:
    """Modules of mixers that keep a state, and of a layer's extras."""
    for i, layer in enumerate(spec.layers):
        place = Place(prefix=f"{spec.names.layers}.{i}", where=i, hidden_size=spec.hidden_size)
        states = (
            m for m in layer.mixers if any(isinstance(c, StateCache) for c in m.caches(Rank()))
        )
        for block in (*states, *layer.extras):
            for weight in block.weights(place):
                yield from (module_name(part.source) for part in weight.parts)
