"""Read compressed-tensors' `quantization_config`: groups of targets, each with its arguments.

The choice among schemes is vLLM's (`compressed_tensors.py: _get_scheme_from_parts`); defaults of
the arguments are those of compressed-tensors' `QuantizationArgs`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.quantization import schemes
from tightfit.model.quantization.forms import Form, Forms
from tightfit.model.quantization.matching import compressed_tensors
from tightfit.model.quantization.recipe import Inputs, Recipe, Rule

_INTEGERS = ("int-quantized", "naive-quantized")
_FORMATS = (
    "dense",
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
)
PLACEHOLDERS = (
    *(Form(kind=kind, dtype="F32", fill=1.0) for kind in ("k_scale", "v_scale", "q_scale")),
    *(Form(kind=kind, dtype=None) for kind in ("k_zero_point", "v_zero_point", "q_zero_point")),
)
_SCALES_OF_HEADS = (
    "its cache has a scale for each head, and vLLM puts others together from them while it loads"
)
_CACHE_SCALES = r"\.[kvq]_(scale|zero_point)$|\.[kvq]_proj\.output_(scale|zero_point)$"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arguments:
    """`QuantizationArgs`: how values of one kind are quantized."""

    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, ...]
    dynamic: bool
    scale_dtype: str
    actorder: str | None

    @classmethod
    def read(cls, section: Config) -> "_Arguments":
        size = section.integer("group_size", default=0, minimum=-1)
        strategy = "group" if size > 0 else "channel" if size < 0 else "tensor"
        # `dynamic` may be "local": scales of groups, beside a static one for all.
        dynamic = section.raw("dynamic", default=False)
        order = section.raw("actorder")
        return cls(
            bits=section.integer("num_bits", default=8, maximum=64),
            floating=section.text("type", default="int") == "float",
            symmetric=section.boolean("symmetric", default=True),
            strategy=section.text("strategy", default=strategy),
            group_size=size if size > 0 else None,
            block=section.integers("block_structure"),
            dynamic=dynamic is True,
            scale_dtype=section.text("scale_dtype", default=""),
            actorder=order if isinstance(order, str) else None,
        )


def read(section: Config, head: str) -> Recipe | None:
    """The recipe of a `quantization_config`; None for one that changes nothing on disk.

    Raises:
        ConfigError: a group or a list is malformed.
        UnsupportedModelError: a scheme whose tensors are not modelled.
    """
    sparsity = section.section("sparsity_config")
    if sparsity is not None and sparsity.strings("targets"):
        raise UnsupportedModelError("a sparsity_config of compressed-tensors is not modelled")
    default = section.text("format", default="dense")
    rules: list[Rule] = []
    names: list[str] = []
    ordered = False
    for group in _groups(section):
        targets = group.strings("targets")
        weights = group.section("weights")
        if weights is None or (len(targets) == 1 and targets[0].endswith("Attention")):
            continue
        form = group.text("format", default=default)
        arguments = _Arguments.read(weights)
        ordered |= arguments.actorder in ("group", "dynamic")
        forms = _forms(group, arguments, form)
        if forms is None:
            continue
        _refuse_embeddings(targets)
        names.append(_label(arguments, group))
        rules.append(
            Rule(
                forms=forms,
                names=compressed_tensors(targets),
                everything="Linear" in targets,
                inputs=_inputs(group),
            )
        )
    if not rules:
        return None
    reason = "it sorts inputs into groups by activation order, which vLLM 0.32 no longer loads"
    cache = section.section("kv_cache_scheme")
    by_head = cache is not None and _Arguments.read(cache).strategy == "attn_head"
    return Recipe(
        name=f"compressed-tensors ({', '.join(dict.fromkeys(names))})",
        rules=tuple(rules),
        ignored=compressed_tensors(section.strings("ignore")),
        head=head,
        placeholders=PLACEHOLDERS,
        optional_sources=(_CACHE_SCALES, r"\.weight_g_idx$"),
        unsharded=_SCALES_OF_HEADS if by_head else None,
        refused=(((0, 32), (1000, 0), reason),) if ordered else (),
    )


def cache_dtype(section: Config) -> str | None:
    """`fp8` if the checkpoint asks for a quantized KV cache.

    Raises:
        UnsupportedModelError: a cache that vLLM does not have.
    """
    scheme = section.section("kv_cache_scheme")
    if scheme is None:
        return None
    arguments = _Arguments.read(scheme)
    fine = arguments.floating and arguments.bits == 8 and arguments.symmetric
    if not fine or arguments.strategy not in ("tensor", "attn_head"):
        raise UnsupportedModelError(
            "kv_cache_scheme is not symmetric fp8 with a scale for each tensor or head",
            hint="vLLM does not load it either",
        )
    return "fp8"


def _groups(section: Config) -> Iterator[Config]:
    groups = section.raw("config_groups", default={})
    if not isinstance(groups, Mapping):
        raise ConfigError(
            f"{section.name} has config_groups that are no object",
            hint="correct the config.json, or download it again",
        )
    for name in groups:
        if isinstance(groups[name], str):
            raise UnsupportedModelError(
                f"config_groups names the scheme {name!r} without its arguments"
            )
        group = Config(groups, name=f"{section.name}: config_groups").section(name)
        if group is not None:
            yield group


def _forms(group: Config, weights: _Arguments, form: str) -> Forms | None:
    if form not in _FORMATS:
        raise UnsupportedModelError(
            f"the format {form!r} of compressed-tensors is not modelled",
            hint="modelled: " + ", ".join(_FORMATS),
        )
    if form == "dense":
        return None
    if group.section("output_activations") is not None:
        raise UnsupportedModelError("output_activations of compressed-tensors are not modelled")
    section = group.section("input_activations")
    inputs = None if section is None else _Arguments.read(section)
    if weights.floating:
        return _floats(weights, inputs)
    if form == "pack-quantized":
        return schemes.pack_quantized(weights.bits, weights.group_size, symmetric=weights.symmetric)
    if form not in _INTEGERS or not weights.symmetric or weights.bits > 8:
        raise _unknown(weights, form)
    static = inputs is not None and not inputs.dynamic
    symmetric = inputs is None or inputs.symmetric
    if weights.strategy == "tensor":
        return schemes.per_tensor("I8", static=static, scale_dtype=None, symmetric=symmetric)
    if weights.strategy == "channel":
        return schemes.per_channel("I8", static=static, symmetric=symmetric)
    if weights.strategy == "group" and weights.group_size and not static:
        return (
            Form(kind="weight", dtype="I8"),
            Form(kind="weight_scale", dtype=None, columns=weights.group_size),
        )
    raise _unknown(weights, form)


def _floats(weights: _Arguments, inputs: _Arguments | None) -> Forms:
    static = inputs is not None and not inputs.dynamic
    if weights.bits == 4 and weights.strategy == "tensor_group" and weights.group_size == 16:
        return schemes.nvfp4(activations=inputs is not None)
    if weights.bits == 4 and weights.strategy == "group" and weights.group_size == 32:
        return schemes.mxfp4()
    exponents = weights.scale_dtype.removeprefix("torch.") == "uint8"
    if weights.bits == 8 and weights.group_size == 32 and exponents:
        return schemes.mxfp8()
    if weights.bits == 8 and weights.strategy == "tensor":
        return schemes.per_tensor(schemes.FP8, static=static, scale_dtype=None)
    if weights.bits == 8 and weights.strategy == "channel":
        return schemes.per_channel(schemes.FP8, static=static)
    if weights.bits == 8 and weights.strategy == "block" and len(weights.block) == 2:
        rows, columns = weights.block
        if min(rows, columns) > 0:
            return schemes.fp8_block(rows, columns, scale="weight_scale", dtype=None)
    raise _unknown(weights, "floats")


def _unknown(weights: _Arguments, form: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"weights of {weights.bits} bits ({form}, strategy {weights.strategy}, group_size "
        f"{weights.group_size}, symmetric {weights.symmetric}) are not modelled"
    )


def _inputs(group: Config) -> Inputs | None:
    section = group.section("input_activations")
    if section is None:
        return None
    given = _Arguments.read(section)
    floats = "F4_E2M1" if given.bits == 4 else schemes.FP8
    return Inputs(
        dtype=floats if given.floating else "I8",
        group_size=given.group_size or 0,
        exponents=given.scale_dtype.removeprefix("torch.") == "uint8",
    )


def _refuse_embeddings(targets: tuple[str, ...]) -> None:
    for target in targets:
        if target == "Embedding" or target.endswith("embed_tokens"):
            raise UnsupportedModelError("quantized embeddings are not modelled")


def _label(weights: _Arguments, group: Config) -> str:
    kind = "fp" if weights.floating else "int"
    inputs = group.section("input_activations")
    activations = "16" if inputs is None else str(_Arguments.read(inputs).bits)
    shape = f" group {weights.group_size}" if weights.group_size else f" {weights.strategy}"
    asymmetric = "" if weights.symmetric else " asymmetric"
    return f"{kind} w{weights.bits}a{activations}{shape}{asymmetric}"
