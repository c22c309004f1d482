"""Mistral Small 3.1 and Ministral 3: Mistral with Pixtral's encoder."""

from tightfit.errors import UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.pixtral import mistral3_tower

ARCHITECTURES = ("Mistral3ForConditionalGeneration",)


def spec(config: Config) -> ModelSpec:
    """The decoder is Mistral's; Ministral 3 differs by the scaling of its rope.

    It is tied only where a config says so: `Mistral3Config` of transformers 5 ties by default, and
    the checkpoints of Mistral Small 3.1 were saved before that, with an `lm_head`.
    """
    section = config.section("text_config")
    kind = section.text("model_type", default="mistral") if section else "mistral"
    if kind not in ("mistral", "ministral3"):
        raise UnsupportedModelError(f"a text model of type {kind!r} in Mistral 3 is not modelled")
    text = text_spec(config, "MistralForCausalLM")
    tower = mistral3_tower(config, text.hidden_size)
    return nested(text, "language_model.model", "language_model.lm_head", (tower,), verified=True)
