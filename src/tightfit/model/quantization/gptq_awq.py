"""Read the `quantization_config` of GPTQ and AWQ, which quantize linear layers of the decoder."""

import re
from collections.abc import Iterable, Mapping

from tightfit.errors import UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.quantization import schemes
from tightfit.model.quantization.forms import Forms
from tightfit.model.quantization.matching import Names
from tightfit.model.quantization.recipe import Recipe, Rule

_ALWAYS = (1000, 0)
_NO_ORDER = "GPTQ with desc_act and groups is no longer loaded by vLLM 0.32"
_ONLY_SYMMETRIC = "vLLM 0.32 loads GPTQ only if it is symmetric, of 4 or 8 bits"


def gptq(section: Config, head: str) -> Recipe:
    """`bits`, `group_size`, `desc_act`, `sym`; `dynamic` has exceptions by pattern (GPTQModel).

    Raises:
        ConfigError: a value is malformed.
        UnsupportedModelError: a packing that is not modelled.
    """
    packing = section.text("checkpoint_format", default="gptq")
    if packing not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(f"GPTQ's checkpoint_format {packing!r} is not modelled")
    bits, group_size, symmetric = _gptq_values(section)
    forms = schemes.gptq(bits, group_size, symmetric=symmetric)
    inside = _flat(section.raw("modules_in_block_to_quantize", default=()))
    listed = Names(patterns=[f".*{re.escape(name)}" for name in inside])
    base = Rule(forms=forms, names=listed, everything=not inside)
    refused = []
    if section.boolean("desc_act") and group_size is not None:
        refused.append(((0, 32), _ALWAYS, _NO_ORDER))
    if bits not in (4, 8) or not symmetric:
        refused.append(((0, 32), _ALWAYS, _ONLY_SYMMETRIC))
    return Recipe(
        name=f"gptq (w{bits} group {group_size or 'all'})",
        rules=(*_dynamic(section), base),
        head=head if section.boolean("lm_head") else None,
        layers_only=True,
        # AutoGPTQ writes biases of zeros for layers that have none.
        optional_sources=(r"_proj\.bias$",),
        refused=tuple(refused),
    )


def awq(section: Config, head: str) -> Recipe:
    """`bits`, `group_size`, `zero_point`, `version`; names match anywhere in a module's.

    Raises:
        ConfigError: a value is malformed.
        UnsupportedModelError: a version with another packing than `gemm`.
    """
    version = section.text("version", default="gemm").lower()
    if version != "gemm":
        raise UnsupportedModelError(
            f"AWQ of version {version!r} is not modelled", hint="modelled: gemm"
        )
    bits = section.integer("w_bit", "bits", default=4, maximum=32)
    size = section.integer("q_group_size", "group_size", default=128, minimum=-1)
    group_size = size if size > 0 else None
    forms = schemes.awq(bits, group_size, zero_point=section.boolean("zero_point", default=True))
    return Recipe(
        name=f"awq (w{bits} group {group_size or 'all'})",
        rules=(Rule(forms=forms, everything=True),),
        ignored=Names(contained=section.strings("modules_to_not_convert")),
        head=head if section.boolean("lm_head") else None,
        layers_only=True,
    )


def auto_round(section: Config, head: str) -> Recipe:
    """AutoRound exports in the packings of others.

    Raises:
        UnsupportedModelError: one that is not modelled, or layers with values of their own.
    """
    packing = section.text("packing_format", default="auto_round")
    if section.raw("extra_config"):
        raise UnsupportedModelError("AutoRound's extra_config is not modelled")
    if "gptq" in packing:
        return gptq(section, head)
    if "awq" in packing:
        return awq(section, head)
    raise UnsupportedModelError(f"AutoRound's packing_format {packing!r} is not modelled")


def _gptq_values(section: Config) -> tuple[int, int | None, bool]:
    size = section.integer("group_size", default=128, minimum=-1)
    return (
        section.integer("bits", default=4, maximum=32),
        size if size > 0 else None,
        section.boolean("sym", default=True),
    )


def _dynamic(section: Config) -> tuple[Rule, ...]:
    exceptions = section.raw("dynamic", default={})
    if not isinstance(exceptions, Mapping):
        raise UnsupportedModelError("GPTQ's 'dynamic' is no object, and is not modelled")
    found = []
    for pattern, values in exceptions.items():
        forms: Forms | None = None
        if not pattern.startswith("-:"):
            inherited = {key: section.raw(key) for key in ("bits", "group_size", "sym")}
            given = values if isinstance(values, Mapping) else {}
            merged = Config({**inherited, **given}, name=f"{section.name}: dynamic")
            bits, group_size, symmetric = _gptq_values(merged)
            forms = schemes.gptq(bits, group_size, symmetric=symmetric)
        regex = pattern.removeprefix("-:").removeprefix("+:")
        found.append(Rule(forms=forms, names=Names(patterns=(regex,))))
    return tuple(found)


def _flat(names: object) -> Iterable[str]:
    if isinstance(names, str):
        return (names,)
    if isinstance(names, list | tuple):
        return tuple(name for inner in names for name in _flat(inner))
    return ()
