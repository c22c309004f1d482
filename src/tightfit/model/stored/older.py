"""vLLM's names of parameters before the modules of today.

Read in the sources of versions 0.8.5 to 0.31.0: in those every module of a family listed here makes
the same parameters as in 0.32, but for what these tables say. Some were built without weights:
Llama and Qwen3-MoE of 0.12.0, Llama of 0.16.0, all with experts of 0.25.1 and some of 0.27.1. Of
other families the routers, shared experts or heads moved, and nobody has listed them.
"""

from collections.abc import Collection
from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.stored.names import FamilyNames, text_names

_DENSE = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "GraniteForCausalLM",
    "StableLmForCausalLM",
)
_WITH_EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
_BUILT_0_25 = (
    *_WITH_EXPERTS,
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
)


def names_0_25(architecture: str) -> FamilyNames:
    """0.25 to 0.31: as in 0.32."""
    return _known(architecture, (*_DENSE, *_BUILT_0_25), "vLLM 0.25 to 0.31")


def names_0_14(architecture: str) -> FamilyNames:
    """0.14 to 0.24: plain decoders as in 0.32, while experts moved from version to version."""
    return _known(architecture, _DENSE, "vLLM 0.14 to 0.24")


def names_0_8(architecture: str) -> FamilyNames:
    """0.8 to 0.13: no constants, and experts and routers where models have them."""
    names = _known(architecture, (*_DENSE, *_WITH_EXPERTS), "vLLM 0.8 to 0.13")
    plain = () if architecture in _WITH_EXPERTS else names.renamed
    return replace(names, renamed=plain, attention=())


def _known(architecture: str, known: Collection[str], engine: str) -> FamilyNames:
    if architecture not in known:
        raise UnsupportedModelError(
            f"the names of {architecture} in {engine} are not known",
            hint="shard for vLLM 0.32 or newer; known there are " + ", ".join(known),
        )
    return text_names(architecture)
