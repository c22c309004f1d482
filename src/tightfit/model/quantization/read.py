"""Read what a checkpoint's config says of its quantization."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.quantization import compressed_tensors, fp8, gptq_awq, modelopt, schemes
from tightfit.model.quantization.recipe import Recipe, Rule
from tightfit.model.spec import ModelSpec

_MXFP4_ALIGNMENT = 64
"""vLLM rounds a rank's width of gpt-oss's experts up to this for Triton's kernels (H100)."""

_READERS: Mapping[str, Callable[[Config, str], Recipe | None]] = {
    "auto-round": gptq_awq.auto_round,
    "awq": gptq_awq.awq,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": lambda section, _: fp8.fbgemm(section),
    "fp8": lambda section, _: fp8.fp8(section),
    "gptq": gptq_awq.gptq,
    "modelopt": modelopt.read,
    "mxfp4": lambda _section, _head: _mxfp4(),
    "mxfp8": lambda section, head: modelopt.read(section, head, default="MXFP8"),
}
_SPELLINGS: Mapping[str, str] = {
    "auto_awq": "awq",
    "auto_gptq": "gptq",
    "awq_marlin": "awq",
    "compressed_tensors": "compressed-tensors",
    "gpt_oss_mxfp4": "mxfp4",
    "gptq_marlin": "gptq",
    "intel/auto-round": "auto-round",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
    "modelopt_mxfp8": "modelopt",
}
_HINTS: Mapping[str, str] = {
    "bitsandbytes": "vLLM 0.28 and later do not load it; plan the unquantized model with "
    "--quantization fp8_per_tensor or w4a16",
}


def read_quantization(config: Config, spec: ModelSpec) -> ModelSpec:
    """Add the checkpoint's quantization to the spec.

    The section may be that of the text model (vLLM's `config/model.py` looks there too).

    Raises:
        ConfigError: the section is malformed.
        UnsupportedModelError: a method whose tensors are not modelled.
    """
    if spec.quantization is not None:
        # A family of a scheme of its own has read it: DeepSeek V4.
        return spec
    text = config.section("text_config")
    section = config.section("quantization_config") or config.section("compression_config")
    nested = section is None and text is not None
    if nested and text is not None:
        section = text.section("quantization_config")
    if section is None:
        return spec
    method = _method(section)
    if method not in _READERS:
        raise UnsupportedModelError(
            f"quantization_config with quant_method {method!r} is not modelled",
            hint=_HINTS.get(method, "modelled: " + ", ".join(_READERS)),
        )
    recipe = _READERS[method](section, f"{spec.names.head}.weight")
    if nested and recipe is not None:
        # It is the text model's alone: towers stay as they are, though no list says so.
        recipe = replace(recipe, layers_only=True)
    if method == "mxfp4" and not (config.has("dtype") or config.has("torch_dtype")):
        # gpt-oss does not say; vLLM computes MXFP4 in no other dtype.
        spec = replace(spec, dtype="BF16")
    return replace(spec, quantization=recipe, kv_cache_quantization=_cache_dtype(method, section))


def _method(section: Config) -> str:
    if section.has("quant_method"):
        method = section.text("quant_method").lower()
        return _SPELLINGS.get(method, method)
    # Old llm-compressor and ModelOpt files do not say.
    if section.has("config_groups"):
        return "compressed-tensors"
    return "modelopt" if section.has("quant_algo") or section.has("quantization") else "unnamed"


def _cache_dtype(method: str, section: Config) -> str | None:
    if method == "compressed-tensors":
        return compressed_tensors.cache_dtype(section)
    return modelopt.cache_dtype(section) if method == "modelopt" else None


def _mxfp4() -> Recipe:
    """gpt-oss: only its experts are quantized, stacked as they are, whatever the lists say."""
    return Recipe(
        name="mxfp4",
        rules=(Rule(forms=schemes.mxfp4_blocks(), everything=True),),
        experts_only=True,
        splits_experts=False,
        padded_experts=_MXFP4_ALIGNMENT,
    )
