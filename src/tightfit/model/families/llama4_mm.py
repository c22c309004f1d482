"""Llama 4 with images."""

from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.llama4 import llama4_tower

ARCHITECTURES = ("Llama4ForConditionalGeneration",)


def spec(config: Config) -> ModelSpec:
    """The decoder is Llama 4's own."""
    text = text_spec(config, "Llama4ForCausalLM")
    tower = llama4_tower(config, text.hidden_size)
    return nested(text, "language_model.model", "language_model.lm_head", (tower,), verified=True)
