"""Read ModelOpt's quantization: `hf_quant_config.json`, or its twin in config.json.

vLLM's `modelopt.py`: what a `quant_algo` stores, and what `exclude_modules` mean.
"""

from collections.abc import Mapping

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.quantization import schemes
from tightfit.model.quantization.forms import Form, Forms
from tightfit.model.quantization.matching import Names, modules
from tightfit.model.quantization.recipe import Inputs, Recipe, Rule

PLACEHOLDERS = tuple(
    Form(kind=kind, dtype=None, scalar=True, fill=-1.0)
    for kind in ("q_scale", "k_scale", "v_scale", "prob_scale")
)
_OPTIONAL = (r"\.[kvq]_proj\.[kvq]_scale$|\.[kvq]_scale$|_quantizer\.", r"\.input_scale$")
_TOWERS = r".*(vision_tower|vision_model|vit_large_projector)"
_INPUTS = {
    "FP8": Inputs(dtype=schemes.FP8),
    "FP8_PER_CHANNEL_PER_TOKEN": Inputs(dtype=schemes.FP8),
    "FP8_BLOCK_SCALES": Inputs(dtype=schemes.FP8, group_size=128),
    "NVFP4": Inputs(dtype="F4_E2M1", group_size=16),
    "MXFP8": Inputs(dtype=schemes.FP8, group_size=32, exponents=True),
}
_CACHE = {"FP8": "fp8_e4m3", "NVFP4": "nvfp4"}


def read(section: Config, head: str, *, default: str = "none") -> Recipe:
    """The recipe of ModelOpt's section, of a `default` algorithm if it names none.

    Raises:
        ConfigError: a list is malformed.
        UnsupportedModelError: an algorithm whose tensors are not modelled.
    """
    inner = section.section("quantization") or section
    algorithm = inner.text("quant_algo", default=default).upper()
    key = "exclude_modules" if inner.has("exclude_modules") else "ignore"
    excluded = inner.strings(key) or inner.strings("modules_to_not_convert")
    if algorithm == "MIXED_PRECISION":
        rules = _mixed(inner)
    else:
        size = inner.integer("group_size", default=16)
        forms = algorithm_forms(algorithm, size)
        rules = (Rule(forms=forms, everything=True, inputs=_INPUTS.get(algorithm)),)
    towers = Rule(forms=None, names=Names(patterns=(_TOWERS,)))
    return Recipe(
        name=f"modelopt ({algorithm})",
        rules=(towers, *rules),
        ignored=modules(excluded),
        head=head,
        placeholders=PLACEHOLDERS,
        latent_placeholders=True,
        optional_sources=_OPTIONAL,
    )


def algorithm_forms(algorithm: str, group_size: int = 16) -> Forms:
    """What a `quant_algo` stores for a matrix.

    Raises:
        UnsupportedModelError: it is not modelled.
    """
    known: dict[str, Forms] = {
        "FP8": schemes.per_tensor(schemes.FP8, static=True),
        "FP8_PER_CHANNEL_PER_TOKEN": schemes.per_channel(
            schemes.FP8, static=False, scale_dtype="F32"
        ),
        "FP8_PB_WO": schemes.fp8_block(128, 128, scale="weight_scale"),
        "FP8_BLOCK_SCALES": schemes.fp8_block(128, 128, scale="weight_scale"),
        "NVFP4": schemes.nvfp4(activations=True, modelopt=True),
        "W4A16_NVFP4": schemes.nvfp4(activations=False, modelopt=True),
        "MXFP8": schemes.mxfp8(),
    }
    if algorithm not in known:
        raise UnsupportedModelError(
            f"ModelOpt's quant_algo {algorithm!r} is not modelled",
            hint="modelled: " + ", ".join((*known, "MIXED_PRECISION")),
        )
    if "NVFP4" in algorithm and group_size != 16:
        raise UnsupportedModelError(f"{algorithm} with group_size = {group_size} is not modelled")
    return known[algorithm]


def cache_dtype(section: Config) -> str | None:
    """The KV cache's dtype that the checkpoint asks for (vLLM's `torch_utils.py`)."""
    inner = section.section("quantization") or section
    scheme = inner.raw("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        floating = scheme.get("type") == "float"
        if floating and scheme.get("num_bits") == 8 and scheme.get("dynamic") is False:
            return _CACHE["FP8"]
        return _CACHE["NVFP4"] if floating and scheme.get("num_bits") == 4 else None
    algorithm = scheme or inner.raw("kv_cache_quant_algo")
    return _CACHE.get(algorithm.upper()) if isinstance(algorithm, str) else None


def _mixed(section: Config) -> tuple[Rule, ...]:
    layers = section.raw("quantized_layers")
    if not isinstance(layers, Mapping) or not layers:
        raise ConfigError(
            f"{section.name} has MIXED_PRECISION without quantized_layers",
            hint="the file is incomplete: download it again",
        )
    found: dict[str, list[str]] = {}
    for name, values in layers.items():
        algorithm = values.get("quant_algo") if isinstance(values, Mapping) else None
        if not isinstance(algorithm, str):
            raise ConfigError(
                f"{section.name}: quantized_layers has no quant_algo for {name!r}",
                hint="the file is malformed: download it again",
            )
        found.setdefault(algorithm.upper(), []).append(name)
    return tuple(
        Rule(
            forms=algorithm_forms(algorithm),
            names=modules(names),
            inputs=_INPUTS.get(algorithm),
        )
        for algorithm, names in found.items()
    )
