"""One reader for each `quant_method`."""

from collections.abc import Callable, Mapping

from tightfit.model.config import Config
from tightfit.model.quantization import compressed_tensors, fp8, gptq_awq, modelopt, schemes
from tightfit.model.quantization.recipe import Recipe, Rule

_MXFP4_ALIGNMENT = 64
"""vLLM rounds a rank's width of gpt-oss's experts up to this for Triton's kernels (H100)."""

READERS: Mapping[str, Callable[[Config, str], Recipe | None]] = {
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


def cache_dtype(method: str, section: Config) -> str | None:
    """The KV cache's dtype that a checkpoint asks for.

    Raises:
        UnsupportedModelError: one that no engine has.
    """
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
