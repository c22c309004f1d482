"""Read what a checkpoint's config says of its quantization."""

from collections.abc import Mapping
from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.spec import ModelSpec

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
    "bitsandbytes": "vLLM 0.32 does not load it either; plan the unquantized model with "
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
    from tightfit.model.quantization.readers import READERS, cache_dtype

    method = _method(section)
    if method not in READERS:
        raise UnsupportedModelError(
            f"quantization_config with quant_method {method!r} is not modelled",
            hint=_HINTS.get(method, "modelled: " + ", ".join(READERS)),
        )
    recipe = READERS[method](section, f"{spec.names.head}.weight")
    if nested and recipe is not None:
        # It is the text model's alone: towers stay as they are, though no list says so.
        recipe = replace(recipe, layers_only=True)
    if method == "mxfp4" and not (config.has("dtype") or config.has("torch_dtype")):
        # gpt-oss does not say; vLLM computes MXFP4 in no other dtype.
        spec = replace(spec, dtype="BF16")
    return replace(spec, quantization=recipe, kv_cache_quantization=cache_dtype(method, section))


def _method(section: Config) -> str:
    if section.has("quant_method"):
        method = section.text("quant_method").lower()
        return _SPELLINGS.get(method, method)
    # Old llm-compressor and ModelOpt files do not say.
    if section.has("config_groups"):
        return "compressed-tensors"
    return "modelopt" if section.has("quant_algo") or section.has("quantization") else "unnamed"
