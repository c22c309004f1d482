"""LLaVA-NeXT and LLaVA-OneVision: LLaVA with images of any resolution, and with videos."""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.llava import DECODERS, LLAMA
from tightfit.model.families.nested import nested
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.llava_next import llava_next_tower

ARCHITECTURES = ("LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration")

_TEXT = {**DECODERS, "granite": "GraniteForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def spec(config: Config) -> ModelSpec:
    """Names are those of the published checkpoints, which transformers 5 renames.

    Raises:
        UnsupportedModelError: a decoder that is not modelled.
    """
    one_vision = config.strings("architectures")[0] == "LlavaOnevisionForConditionalGeneration"
    section = config.section("text_config") or Config({}, name=config.name)
    kind = section.text("model_type", default="qwen2" if one_vision else "llama")
    if kind not in _TEXT:
        raise UnsupportedModelError(
            f"LLaVA with a decoder {kind!r} is not modelled", hint="known: " + ", ".join(_TEXT)
        )
    text = text_spec(config, _TEXT[kind], defaults=LLAMA if kind == "llama" else {})
    tower = llava_next_tower(config, text.hidden_size, one_vision=one_vision)
    model = nested(text, "language_model.model", "language_model.lm_head", (tower,))
    return replace(model, ignored_sources=(*model.ignored_sources, r"\.position_ids$"))
