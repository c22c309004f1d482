"""Kimi-VL: DeepSeek's layers with the first MoonViT."""

from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.moonvit import first_moonvit_tower

ARCHITECTURES = ("KimiVLForConditionalGeneration",)


def spec(config: Config) -> ModelSpec:
    """vLLM reads the decoder's config as DeepSeek V2's, whatever it calls itself."""
    text = text_spec(config, "DeepseekV2ForCausalLM")
    tower = first_moonvit_tower(config, text.hidden_size)
    return nested(text, "language_model.model", "language_model.lm_head", (tower,))
