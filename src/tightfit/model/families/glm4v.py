"""GLM-4.1V over GLM-4, and GLM-4.5V over GLM-4.5, with images and videos."""

from collections.abc import Mapping
from typing import Any

from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.glm4v import glm4v_tower

ARCHITECTURES = ("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration")

_DENSE: Mapping[str, Any] = {
    "attention_bias": True,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
}
_MOE: Mapping[str, Any] = {"attention_bias": True, "num_nextn_predict_layers": 0}
"""Of `Glm4vTextConfig` and `Glm4vMoeTextConfig`; the published checkpoints have no layers that
predict more tokens."""


def spec(config: Config) -> ModelSpec:
    """The first configs of GLM-4.1V are flat; later ones nest that of the decoder."""
    dense = config.strings("architectures")[0] == "Glm4vForConditionalGeneration"
    key = None if dense and not config.has("text_config") else "text_config"
    text = text_spec(
        config,
        "Glm4ForCausalLM" if dense else "Glm4MoeForCausalLM",
        key=key,
        defaults=_DENSE if dense else _MOE,
    )
    tower = glm4v_tower(config)
    return nested(text, "model.language_model", "lm_head", (tower,), verified=not dense)
