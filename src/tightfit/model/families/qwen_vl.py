"""Qwen2-VL and Qwen2.5-VL: a Qwen2 whose config is mostly that of its decoder."""

from dataclasses import replace

from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.qwen_vl import qwen2_5_tower, qwen2_tower

ARCHITECTURES = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")


def spec(config: Config) -> ModelSpec:
    """Published configs are flat; transformers 5 writes a `text_config`."""
    key = "text_config" if config.has("text_config") else None
    text = text_spec(config, "Qwen2ForCausalLM", key=key)
    second = config.strings("architectures")[0] == "Qwen2VLForConditionalGeneration"
    tower = qwen2_tower(config) if second else qwen2_5_tower(config)
    model_type = config.text("model_type", default="")
    return replace(text, towers=(tower,), model_type=model_type, verified_for_sharding=True)
