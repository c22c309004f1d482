"""One small file per family: `ARCHITECTURES` and `spec(config) -> ModelSpec`.

`_MODULES` names the file of every architecture, so that planning one model imports one family. A
test checks the table against the files.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

from tightfit.errors import ConfigError, UnknownArchitectureError
from tightfit.model.config import Config
from tightfit.model.families.pooling import as_pooling, pooled_base
from tightfit.model.quantization.read import read_quantization
from tightfit.model.spec import ModelSpec

_MODULES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
    "Gemma3ForConditionalGeneration": "gemma3_mm",
    "WhisperForConditionalGeneration": "whisper",
    "MllamaForConditionalGeneration": "mllama",
    "MuseGlimmerForConditionalGeneration": "muse_glimmer",
    "Gemma3nForCausalLM": "gemma3n",
    "Gemma3nForConditionalGeneration": "gemma3n",
    "Gemma4ForCausalLM": "gemma4",
    "Gemma4ForConditionalGeneration": "gemma4",
    "Mistral3ForConditionalGeneration": "mistral3",
    "Llama4ForConditionalGeneration": "llama4_mm",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo",
    "Olmo3ForCausalLM": "olmo",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
    "DeepseekV32ForCausalLM": "deepseek",
    "GlmMoeDsaForCausalLM": "deepseek",
    "Glm4MoeLiteForCausalLM": "deepseek",
    "MiniCPM3ForCausalLM": "minicpm3",
    "GptOssForCausalLM": "gpt_oss",
    "Llama4ForCausalLM": "llama4",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Glm4MoeForCausalLM": "glm4_moe",
    "PhiMoEForCausalLM": "phimoe",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "DbrxForCausalLM": "dbrx",
    "MiMoV2FlashForCausalLM": "mimo_v2",
    "OlmoeForCausalLM": "olmoe",
    "GraniteMoeForCausalLM": "granitemoe",
    "GraniteMoeSharedForCausalLM": "granitemoe",
    "Ernie4_5_MoeForCausalLM": "ernie45_moe",
    "Dots1ForCausalLM": "dots1",
    "DeepseekV4ForCausalLM": "deepseek_v4",
    "MiniMaxM3ForCausalLM": "minimax_m3",
    "MiniMaxM3SparseForCausalLM": "minimax_m3",
    "MambaForCausalLM": "mamba",
    "FalconMambaForCausalLM": "mamba",
    "Mamba2ForCausalLM": "mamba",
    "JambaForCausalLM": "jamba",
    "NemotronHForCausalLM": "nemotron_h",
    "GraniteMoeHybridForCausalLM": "granite_hybrid",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_next",
    "Qwen3_5MoeForCausalLM": "qwen3_next",
    "Lfm2ForCausalLM": "lfm2",
    "Lfm2MoeForCausalLM": "lfm2",
    "FalconH1ForCausalLM": "falcon_h1",
    "BambaForCausalLM": "falcon_h1",
    "KimiLinearForCausalLM": "kimi_linear",
    "MiniMaxForCausalLM": "minimax",
    "MiniMaxText01ForCausalLM": "minimax",
    "MiniMaxM1ForCausalLM": "minimax",
    "LlavaForConditionalGeneration": "llava",
    "Qwen2VLForConditionalGeneration": "qwen_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl",
    "Qwen3_5ForConditionalGeneration": "qwen3_vl",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_vl",
    "Glm4vMoeForConditionalGeneration": "glm4v",
    "InternVLChatModel": "internvl",
    "InternVLForConditionalGeneration": "internvl",
    "KimiK25ForConditionalGeneration": "kimi_k25",
    "KimiK3ForConditionalGeneration": "kimi_k3",
    "Phi3VForCausalLM": "phi3v",
    "DeepseekVLV2ForCausalLM": "deepseek_vl2",
    "GPT2LMHeadModel": "gpt2",
    "GPTBigCodeForCausalLM": "gpt2",
    "FalconForCausalLM": "falcon",
    "PhiForCausalLM": "phi",
    "Starcoder2ForCausalLM": "starcoder2",
    "StableLmForCausalLM": "stablelm",
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere",
    "InternLM2ForCausalLM": "internlm2",
    "ChatGLMModel": "chatglm",
    "GlmForCausalLM": "glm",
    "Glm4ForCausalLM": "glm",
    "ExaoneForCausalLM": "exaone",
    "Exaone4ForCausalLM": "exaone",
    "MiMoForCausalLM": "mimo",
    "DeciLMForCausalLM": "nemotron_nas",
    "NemotronForCausalLM": "nemotron",
    "Jais2ForCausalLM": "nemotron",
    "OPTForCausalLM": "opt",
    "GPTNeoXForCausalLM": "gpt_neox",
    "GPTJForCausalLM": "gptj",
    "BloomForCausalLM": "bloom",
    "MPTForCausalLM": "mpt",
    "BaichuanForCausalLM": "baichuan",
    "BaiChuanForCausalLM": "baichuan",
    "QWenLMHeadModel": "qwen",
    "PersimmonForCausalLM": "persimmon",
    "SeedOssForCausalLM": "llama_like",
    "SmolLM3ForCausalLM": "llama_like",
    "ArceeForCausalLM": "llama_like",
    "Ernie4_5ForCausalLM": "llama_like",
    "HunYuanDenseV1ForCausalLM": "llama_like",
    "HeliumForCausalLM": "llama_like",
    "MiniCPMForCausalLM": "llama_like",
    "SolarForCausalLM": "llama_like",
    "OrionForCausalLM": "llama_like",
    "OlmoForCausalLM": "llama_like",
    "CwmForCausalLM": "llama_like",
    "HyperCLOVAXForCausalLM": "llama_like",
    "ApertusForCausalLM": "apertus",
    "DeepseekForCausalLM": "deepseek",
    "TeleFLMForCausalLM": "llama_like",
    "BailingMoeForCausalLM": "bailing",
    "BailingMoeV2ForCausalLM": "bailing",
    "AfmoeForCausalLM": "afmoe",
    "ExaoneMoeForCausalLM": "exaone_moe",
    "Cohere2MoeForCausalLM": "cohere",
    "Step3p5ForCausalLM": "step3p5",
    "LongcatFlashForCausalLM": "longcat",
    "Glm4vForConditionalGeneration": "glm4v",
    "KimiVLForConditionalGeneration": "kimi_vl",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_next",
    "Idefics3ForConditionalGeneration": "idefics3",
    "SmolVLMForConditionalGeneration": "idefics3",
    "PaliGemmaForConditionalGeneration": "paligemma",
    "Cohere2VisionForConditionalGeneration": "cohere2_vision",
    "Qwen2AudioForConditionalGeneration": "qwen2_audio",
    "OlmoHybridForCausalLM": "olmo_hybrid",
    "TeleChat2ForCausalLM": "telechat2",
    "Zamba2ForCausalLM": "zamba2",
}
_UNNAMED: Mapping[str, str] = {"deepseek_vl_v2": "DeepseekVLV2ForCausalLM"}
"""By model type, what vLLM's config class fills in where a config names no architecture."""

_SAME: Mapping[str, str] = {
    "AquilaForCausalLM": "LlamaForCausalLM",
    "AquilaModel": "LlamaForCausalLM",
    "ChatGLMForConditionalGeneration": "ChatGLMModel",
    "ExaoneMoEForCausalLM": "ExaoneMoeForCausalLM",
    "IQuestCoderForCausalLM": "LlamaForCausalLM",
    "InternLM3ForCausalLM": "LlamaForCausalLM",
    "InternS1ForConditionalGeneration": "InternVLForConditionalGeneration",
    "InternLMForCausalLM": "LlamaForCausalLM",
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "Ministral3ForCausalLM": "MistralForCausalLM",
    "MistralLarge3ForCausalLM": "DeepseekV3ForCausalLM",
    "MptForCausalLM": "MPTForCausalLM",
    "RWForCausalLM": "FalconForCausalLM",
    "StableLMEpochForCausalLM": "StableLmForCausalLM",
    "TeleChat3ForCausalLM": "LlamaForCausalLM",
    "XverseForCausalLM": "LlamaForCausalLM",
}
"""Other names of the same, which vLLM's registry knows or knew."""


def architectures() -> tuple[str, ...]:
    """Every architecture that tightfit models."""
    return tuple(_MODULES)


def model_spec(values: Mapping[str, Any]) -> ModelSpec:
    """Describe the model of a `config.json`.

    Raises:
        ConfigError: a needed key is missing or has an impossible value.
        UnsupportedModelError: the architecture, or a feature of it, is not modelled.
    """
    config = Config(values)
    names = config.strings("architectures")
    unnamed = _UNNAMED.get(config.text("model_type", default="")) if not names else None
    if unnamed is not None:
        names = (unnamed,)
        config = config.with_defaults({"architectures": [unnamed]})
    if not names:
        raise ConfigError(
            "config.json lacks 'architectures'",
            hint="is this the config.json of a complete Hugging Face checkpoint?",
        )
    return read_quantization(config, _named(config, names[0]))


def _named(config: Config, name: str) -> ModelSpec:
    """The spec by any name: that of the model itself, of another, or of a pooling model."""
    target = _SAME.get(name, name)
    base = None if target in _MODULES else pooled_base(target, _MODULES)
    spec: ModelSpec = _family(base or target).spec(config.as_architecture(base or target))
    spec = spec if base is None else as_pooling(spec, config, name)
    return replace(
        spec,
        architecture=name,
        verified_for_sharding=spec.verified_for_sharding and target == name and base is None,
    )


def text_spec(
    config: Config,
    architecture: str,
    *,
    key: str | None = "text_config",
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> ModelSpec:
    """Describe the decoder of a multimodal model, whose config nests that of a text model.

    What the nested config leaves out is taken from the outer one where models put it there, and
    from `defaults`. Without a `key` the config itself describes the decoder: Qwen2-VL.

    Raises:
        ConfigError: the nested config is missing, or wrong.
        UnsupportedModelError: a feature of it is not modelled.
    """
    nested = config if key is None else config.section(key)
    if nested is None:
        raise ConfigError(
            f"{config.name} lacks {key!r}",
            hint="is this the config.json of a complete Hugging Face checkpoint?",
        )
    nested = nested.completed(config, architecture).with_defaults(defaults)
    spec: ModelSpec = _family(architecture).spec(nested)
    # Inside a multimodal model an engine may have other names for the same modules.
    return replace(
        spec, architecture=config.strings("architectures")[0], verified_for_sharding=False
    )


def _stem(architecture: str) -> str:
    """The name of the family, without what its class is for."""
    return re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", architecture).lower()


def _family(architecture: str) -> Any:
    """The module of a family, which has `spec(config)`."""
    if architecture not in _MODULES:
        from difflib import get_close_matches

        stems = {_stem(name): name for name in reversed(tuple(_MODULES))}
        matches = get_close_matches(_stem(architecture), stems, n=3, cutoff=0.7)
        close = [stems[match] for match in matches]
        raise UnknownArchitectureError(
            f"architecture {architecture} is not modelled",
            hint=f"close names that are: {', '.join(close)}" if close else None,
        )
    return import_module(f"{__name__}.{_MODULES[architecture]}")
