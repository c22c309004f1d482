"""Kimi-K3: a large Kimi Linear with MoonViT."""

from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.moonvit import moonvit_tower

ARCHITECTURES = ("KimiK3ForConditionalGeneration",)


def spec(config: Config) -> ModelSpec:
    """The decoder is that of `kimi_linear`."""
    text = text_spec(config, "KimiLinearForCausalLM")
    tower = moonvit_tower(config, text.hidden_size, third=True)
    return nested(text, "language_model.model", "language_model.lm_head", (tower,))
