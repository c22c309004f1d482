"""Gemma 3 with images."""

from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.gemma3 import gemma3_tower

ARCHITECTURES = ("Gemma3ForConditionalGeneration",)


def spec(config: Config) -> ModelSpec:
    """The decoder is Gemma 3's; what its config leaves out is as in `Gemma3TextConfig`."""
    text = text_spec(config, "Gemma3ForCausalLM")
    tower = gemma3_tower(config, text.hidden_size)
    return nested(text, "language_model.model", "language_model.lm_head", (tower,), verified=True)
