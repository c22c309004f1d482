"""InternVL 2, 2.5 and 3: InternViT before a Qwen2, Qwen3, Llama or gpt-oss."""

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.internvl import internvl_chat_tower, internvl_tower

ARCHITECTURES = ("InternVLChatModel", "InternVLForConditionalGeneration")

_TEXT = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
_VIDEO_TOKEN = 151_656
"""`<|video_pad|>` in tokenizers since Qwen 2.5; vLLM takes videos where there is one."""


def spec(config: Config) -> ModelSpec:
    """Of the two forms of checkpoint, the one of transformers has its config in `text_config`.

    Raises:
        UnsupportedModelError: a decoder that is not modelled.
    """
    chat = config.strings("architectures")[0] == "InternVLChatModel"
    key = "llm_config" if chat and config.has("llm_config") else "text_config"
    section = config.section(key)
    if section is None:
        raise ConfigError(
            f"{config.name} lacks {key!r}",
            hint="is this the config.json of a complete Hugging Face checkpoint?",
        )
    kind = section.text("model_type", default="qwen2")
    if kind not in _TEXT:
        raise UnsupportedModelError(
            f"InternVL with a decoder {kind!r} is not modelled", hint="known: " + ", ".join(_TEXT)
        )
    text = text_spec(config, _TEXT[kind], key=key)
    if chat:
        has_video = kind in ("qwen3", "qwen3_moe", "gpt_oss") or (
            kind == "qwen2" and text.vocab_size > _VIDEO_TOKEN
        )
        tower = internvl_chat_tower(config, text.hidden_size, has_video=has_video)
    else:
        tower = internvl_tower(config, text.hidden_size)
    at, verified = "language_model", kind not in ("qwen3_moe", "gpt_oss")
    return nested(text, f"{at}.model", f"{at}.lm_head", (tower,), verified=verified)
