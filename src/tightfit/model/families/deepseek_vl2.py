"""DeepSeek-VL2, whose decoder has plain attention in the smaller models and MLA in the largest."""

from tightfit.errors import ConfigError
from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.deepseek_vl2 import deepseek_vl2_tower

ARCHITECTURES = ("DeepseekVLV2ForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """The decoder's config is in `language_config`.

    Raises:
        ConfigError: the projector makes embeddings of another width than the decoder's.
    """
    text = text_spec(config, "DeepseekV2ForCausalLM", key="language_config")
    tower = deepseek_vl2_tower(config)
    if tower.output_size != text.hidden_size:
        raise ConfigError(
            f"{config.name} has n_embed = {tower.output_size} in projector_config, and a decoder "
            f"of hidden_size = {text.hidden_size}",
            hint="correct the config.json",
        )
    return nested(text, "language.model", "language.lm_head", (tower,))
