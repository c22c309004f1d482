"""Quantize a model that is not quantized yet: in an engine while it loads, or by `quantize`.

vLLM's names are those of its `--quantization` (`vllm/config/quantization.py`,
`model_executor/layers/quantization/online/`); what a rank has loaded is quantized layer by layer,
and the checkpoint stays as it is. The names of `tightfit quantize` describe a checkpoint that it
would write, in the compressed-tensors format.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from tightfit.errors import UsageError
from tightfit.model.layout import Parallel, Weight
from tightfit.model.quantization import schemes
from tightfit.model.quantization.base import Quantization
from tightfit.model.quantization.forms import Form, Forms
from tightfit.model.quantization.recipe import Recipe, Rule
from tightfit.model.quantization.written import SCHEMES, Choice, Wish, written
from tightfit.model.spec import ModelSpec

_VALUES = Form(kind="weight", dtype=schemes.FP8)
_ONE = Form(kind="weight_scale", dtype="F32", rows=0, columns=None, shared=True)
_PER_TENSOR: Forms = (_VALUES, _ONE)
_PER_CHANNEL: Forms = (_VALUES, Form(kind="weight_scale", dtype="F32", columns=0))
_PER_BLOCK: Forms = (
    _VALUES,
    Form(kind="weight_scale_inv", dtype="F32", rows=128, columns=128, ragged=True, local=True),
)
_NVFP4_EXPERTS: Forms = (
    Form(kind="weight", dtype="U8", columns=2),
    Form(kind="weight_scale", dtype=schemes.FP8, columns=16),
    replace(_ONE, kind="weight_scale_2"),
    replace(_ONE, kind="input_scale"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Online:
    """What vLLM makes of linear layers and experts."""

    forms: Forms
    experts_only: bool = False
    padded_experts: int = 0


ONLINE: Mapping[str, _Online] = {
    "fp8": _Online(forms=_PER_TENSOR),
    "fp8_per_tensor": _Online(forms=_PER_TENSOR),
    "fp8_per_channel": _Online(forms=_PER_CHANNEL),
    "fp8_per_block": _Online(forms=_PER_BLOCK, padded_experts=128),
    "int8_per_channel_weight_only": _Online(forms=schemes.int8_experts(), experts_only=True),
    "experts_int8": _Online(forms=schemes.int8_experts(), experts_only=True),
    "nvfp4_per_token": _Online(forms=_NVFP4_EXPERTS, experts_only=True),
}
"""vLLM's names, except those that mean the same as a scheme of `quantize`."""


# What a checkpoint's method is called when a user names it as well.
_METHODS: Mapping[str, tuple[str, ...]] = {
    "auto_awq": ("awq",),
    "auto_gptq": ("gptq",),
    "awq": ("awq",),
    "awq_marlin": ("awq",),
    "compressed-tensors": ("compressed-tensors",),
    "fbgemm_fp8": ("fbgemm_fp8",),
    "fp8": ("fp8",),
    "gpt_oss_mxfp4": ("mxfp4",),
    "gptq": ("gptq",),
    "gptq_marlin": ("gptq",),
    "modelopt": ("modelopt",),
    "modelopt_fp4": ("modelopt",),
    "modelopt_mixed": ("modelopt",),
    "modelopt_mxfp8": ("modelopt",),
    "moe_wna16": ("gptq", "awq"),
    "mxfp4": ("mxfp4",),
    "mxfp8": ("modelopt",),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnlineQuantization(Quantization):
    """What an engine quantizes while it loads; the checkpoint is not quantized."""

    recipe: Recipe

    @property
    def name(self) -> str:
        """vLLM's name."""
        return self.recipe.name

    def apply(self, weight: Weight) -> Iterator[Weight]:
        """The weight as it is."""
        yield weight

    def loaded(self, weight: Weight) -> Iterator[Weight]:
        """What the engine makes of it."""
        return self.recipe.loaded(weight)

    def fitted(self, weights: Iterable[Weight], parallel: Parallel) -> "OnlineQuantization":
        """Nothing to adapt: scales are computed from what a rank holds."""
        return self


def quantize_spec(
    spec: ModelSpec, scheme: str, *, group_size: int | None = None, wish: Wish | None = None
) -> ModelSpec:
    """The model as `--quantization SCHEME` makes it.

    Embeddings, output layer, routers, norms and towers stay as they are; so do layers with a state
    and what stands beside mixers and MLPs, in the schemes of `quantize`. Naming the method that the
    checkpoint has already changes nothing.

    Args:
        spec: the model.
        scheme: one of `ONLINE` or `SCHEMES`, or the checkpoint's own method.
        group_size: inputs that share a scale, for the integer schemes of `quantize` that leave
            activations alone; -1 for one scale for each output.
        wish: more than one of `SCHEMES` says, which `scheme` is then but a name of.

    Raises:
        UsageError: no such scheme, a group size where there are none, or a model that is quantized
            already by another method.
    """
    if spec.quantization is not None:
        if spec.quantization.name.partition(" ")[0] in _METHODS.get(scheme, ()):
            return spec
        raise UsageError(
            f"--quantization {scheme}, and the checkpoint is quantized already: "
            f"{spec.quantization.name}",
            hint="leave --quantization out, or give the unquantized model",
        )
    if wish is None and scheme in ONLINE:
        online = ONLINE[scheme]
        recipe = Recipe(
            name=scheme,
            rules=(Rule(forms=online.forms, everything=True),),
            layers_only=True,
            experts_only=online.experts_only,
            padded_experts=online.padded_experts,
        )
        return replace(spec, quantization=OnlineQuantization(recipe=recipe))
    if wish is None and scheme in _METHODS and scheme not in SCHEMES:
        raise UsageError(
            f"--quantization {scheme} is a method of checkpoints, and config.json has no "
            "quantization_config",
            hint="give the quantized checkpoint; or quantize while loading: " + ", ".join(ONLINE),
        )
    if wish is None and scheme not in SCHEMES:
        raise UsageError(
            f"unknown --quantization {scheme!r}",
            hint="vLLM's: " + ", ".join(ONLINE) + "; of checkpoints: " + ", ".join(SCHEMES),
        )
    wish = wish or Wish(default=Choice(scheme=scheme, group_size=group_size))
    cache = "fp8" if wish.kv_cache else None
    return replace(spec, quantization=written(spec, wish), kv_cache_quantization=cache)
