"""Idefics 3 and SmolVLM: tiles before a Llama."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.idefics3 import idefics3_tower

ARCHITECTURES = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")


def spec(config: Config) -> ModelSpec:
    """vLLM builds a Llama, whatever the config names.

    Raises:
        UnsupportedModelError: a decoder of another type.
    """
    section = config.section("text_config") or Config({}, name=config.name)
    kind = section.text("model_type", default="llama")
    if kind != "llama":
        raise UnsupportedModelError(
            f"{config.strings('architectures')[0]} with a decoder {kind!r} is not modelled",
            hint="known: llama",
        )
    text = text_spec(config, "LlamaForCausalLM", defaults={"rms_norm_eps": 1e-5})
    tower = idefics3_tower(config, text.hidden_size)
    return nested(text, "model.text_model", "lm_head", (tower,))
