"""LLaVA 1.5: CLIP and a projector before a Llama, Mistral or Qwen2."""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.llava import llava_tower

ARCHITECTURES = ("LlavaForConditionalGeneration",)

_TEXT = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_LLAMA = {
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
    if kind not in _TEXT:
        raise UnsupportedModelError(
            f"LLaVA with a decoder {kind!r} is not modelled", hint="known: " + ", ".join(_TEXT)
        )
    decoder = text_spec(config, _TEXT[kind], defaults=_LLAMA if kind == "llama" else {})
    tower = llava_tower(config, decoder.hidden_size)
    at = "language_model"
    model = nested(decoder, f"{at}.model", f"{at}.lm_head", (tower,), verified=True)
    return replace(model, ignored_sources=(*model.ignored_sources, r"\.position_ids$"))
