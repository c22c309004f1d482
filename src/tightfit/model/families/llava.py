"""LLaVA 1.5 and Pixtral: CLIP or its kin and a projector before a Llama, Mistral or Qwen2."""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.llava import llava_tower

ARCHITECTURES = ("LlavaForConditionalGeneration",)

DECODERS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
"""Of `LlamaConfig`: the first configs say only what differs."""


def spec(config: Config) -> ModelSpec:
    """Names are those of the published checkpoints, which transformers 5 renames.

    Raises:
        UnsupportedModelError: a decoder that is not modelled.
    """
    text = config.section("text_config") or Config({})
    kind = text.text("model_type", default="llama")
    if kind not in DECODERS:
        raise UnsupportedModelError(
            f"LLaVA with a decoder {kind!r} is not modelled", hint="known: " + ", ".join(DECODERS)
        )
    decoder = text_spec(config, DECODERS[kind], defaults=LLAMA if kind == "llama" else {})
    tower = llava_tower(config, decoder.hidden_size)
    at = "language_model"
    vision = config.section("vision_config") or Config({}, name=config.name)
    clip = vision.text("model_type", default="clip_vision_model") == "clip_vision_model"
    model = nested(decoder, f"{at}.model", f"{at}.lm_head", (tower,), verified=clip)
    return replace(model, ignored_sources=(*model.ignored_sources, r"\.position_ids$"))
