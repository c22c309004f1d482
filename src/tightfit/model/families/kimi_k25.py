"""Kimi K2.5 and K2.6: Kimi K2 with MoonViT."""

from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.moonvit import moonvit_tower

ARCHITECTURES = ("KimiK25ForConditionalGeneration",)


def spec(config: Config) -> ModelSpec:
    """The decoder is DeepSeek V3's."""
    text = text_spec(config, "DeepseekV3ForCausalLM")
    tower = moonvit_tower(config, text.hidden_size)
    at = "language_model"
    return nested(text, f"{at}.model", f"{at}.lm_head", (tower,), verified=True)
