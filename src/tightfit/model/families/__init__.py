"""One small file per family: `ARCHITECTURES` and `spec(config) -> ModelSpec`.

`_MODULES` names the file of every architecture, so that planning one model imports one family. A
test checks the table against the files.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.quantization import read_quantization
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
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo",
    "Olmo3ForCausalLM": "olmo",
}


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
    if not names:
        raise ConfigError(
            "config.json lacks 'architectures'",
            hint="is this the config.json of a complete Hugging Face checkpoint?",
        )
    name = names[0]
    if name not in _MODULES:
        raise UnsupportedModelError(
            f"architecture {name} is not modelled",
            hint="modelled: " + ", ".join(_MODULES),
        )
    module = import_module(f"{__name__}.{_MODULES[name]}")
    spec: ModelSpec = module.spec(config)
    return read_quantization(config, spec)
