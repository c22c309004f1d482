"""Command A Vision: SigLIP on tiles before a Command-R7B or a Command A."""

from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.cohere2_vision import cohere2_vision_tower

ARCHITECTURES = ("Cohere2VisionForConditionalGeneration",)


def spec(config: Config) -> ModelSpec:
    """The decoder is Cohere 2's."""
    text = text_spec(config, "Cohere2ForCausalLM")
    tower = cohere2_vision_tower(config, text.hidden_size)
    return nested(text, "model.language_model", "lm_head", (tower,))
