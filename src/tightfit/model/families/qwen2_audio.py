"""Qwen2-Audio: Whisper's encoder, its frames averaged in pairs, before a Qwen2."""

from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.whisper import qwen2_audio_tower

ARCHITECTURES = ("Qwen2AudioForConditionalGeneration",)

_TEXT = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}
"""Of `Qwen2Config`: the published config says only what differs."""


def spec(config: Config) -> ModelSpec:
    """The decoder is Qwen2's."""
    text = text_spec(config, "Qwen2ForCausalLM", defaults=_TEXT)
    tower = qwen2_audio_tower(config, text.hidden_size)
    return nested(text, "language_model.model", "language_model.lm_head", (tower,))
