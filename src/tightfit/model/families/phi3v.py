"""Phi-3-vision and Phi-3.5-vision: Phi-3 with images."""

from dataclasses import replace

from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.phi3v import phi3v_tower

ARCHITECTURES = ("Phi3VForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """The config is that of the decoder, with the encoder in `img_processor`."""
    text = text_spec(config, "Phi3ForCausalLM", key=None)
    return replace(
        text,
        towers=(phi3v_tower(config, text.hidden_size),),
        model_type=config.text("model_type", default=""),
        ignored_sources=(*text.ignored_sources, r"\.position_ids$", r"vision_embed_tokens\.wte\."),
        verified_for_sharding=False,
    )
