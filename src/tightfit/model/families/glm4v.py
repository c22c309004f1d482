"""GLM-4.5V: GLM-4.5 with images and videos."""

from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.glm4v import glm4v_tower

ARCHITECTURES = ("Glm4vMoeForConditionalGeneration",)

_DEFAULTS = {"attention_bias": True, "num_nextn_predict_layers": 0}
"""Of `Glm4vMoeTextConfig`; the published checkpoints have no layers that predict more tokens."""


def spec(config: Config) -> ModelSpec:
    """The decoder is GLM-4.5's."""
    text = text_spec(config, "Glm4MoeForCausalLM", defaults=_DEFAULTS)
    tower = glm4v_tower(config)
    return nested(text, "model.language_model", "lm_head", (tower,), verified=True)
