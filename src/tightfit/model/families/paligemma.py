"""PaliGemma 1 and 2: SigLIP before a Gemma or a Gemma 2."""

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.paligemma import paligemma_tower

ARCHITECTURES = ("PaliGemmaForConditionalGeneration",)

_TEXT = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM"}


def spec(config: Config) -> ModelSpec:
    """The projector has to be as wide as the decoder.

    Raises:
        ConfigError: it is not.
        UnsupportedModelError: a decoder that is not modelled.
    """
    section = config.section("text_config") or Config({}, name=config.name)
    kind = section.text("model_type", default="gemma")
    if kind not in _TEXT:
        raise UnsupportedModelError(
            f"PaliGemma with a decoder {kind!r} is not modelled", hint="known: " + ", ".join(_TEXT)
        )
    text = text_spec(config, _TEXT[kind])
    width = config.integer("projection_dim", default=2048)
    if width != text.hidden_size:
        raise ConfigError(
            f"{config.name} has projection_dim = {width}, and the decoder's hidden_size is "
            f"{text.hidden_size}",
            hint="correct the config.json",
        )
    tower = paligemma_tower(config, text.hidden_size)
    return nested(text, "language_model.model", "language_model.lm_head", (tower,))
