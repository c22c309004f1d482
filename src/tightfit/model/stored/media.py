"""vLLM's names of multimodal models: where their decoders are, and what their towers are called.

vLLM has every decoder in `language_model`, whatever the checkpoint calls it, and names it there as
it does alone. Towers are mostly under the checkpoint's own names.
"""

from collections.abc import Mapping

from tightfit.model.stored.names import FamilyNames, Renames, text_names

_NESTED: Renames = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(?=(?:embed_tokens|layers|norm)\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(?=visual\.)", ""),
)
_OUT_PROJ: Renames = ((r"^(vision_tower\..*\.self_attn)\.o_proj\.", r"\1.out_proj."),)
_FUSED: Renames = (
    (r"^((?:visual|vision_model)\..*\.attn)\.qkv_proj\.", r"\1.qkv."),
    (r"^((?:visual|vision_model)\..*\.attn)\.o_proj\.", r"\1.proj."),
)
_MOONVIT: Renames = (
    (r"^(vision_tower\..*)\.qkv_proj\.", r"\1.wqkv."),
    (r"^(vision_tower\..*)\.o_proj\.", r"\1.wo."),
    (r"^mm_projector\.proj\.0\.", "mm_projector.linear_1."),
    (r"^mm_projector\.proj\.2\.", "mm_projector.linear_2."),
)
_GEMMA4: Renames = ((r"^model\.(?=(?:vision_tower|embed_vision)\.)", ""),)
_WHISPER = FamilyNames(
    renamed=(
        (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
        (r"\.encoder_attn\.o_proj\.", ".encoder_attn.out_proj."),
        (r"(layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2."),
    ),
    attention=(
        (r"^(.*\.self_attn)\.qkv_proj\.weight$", r"\1.attn"),
        (r"^(.*\.encoder_attn)\.kv_proj\.weight$", r"\1.attn"),
    ),
)


def _media(decoder: str, tower: Renames = ()) -> FamilyNames:
    """The names of a decoder inside, and those of its towers."""
    inner = text_names(decoder)
    renamed = (*_NESTED, *tower, *inner.renamed)
    return FamilyNames(renamed=renamed, attention=inner.attention)


MEDIA: Mapping[str, FamilyNames] = {
    "Qwen2VLForConditionalGeneration": _media("Qwen2ForCausalLM", _FUSED),
    "Qwen2_5_VLForConditionalGeneration": _media("Qwen2ForCausalLM", _FUSED),
    "Qwen3VLForConditionalGeneration": _media("Qwen3ForCausalLM", _FUSED),
    "Qwen3VLMoeForConditionalGeneration": _media("Qwen3MoeForCausalLM", _FUSED),
    "Qwen3_5ForConditionalGeneration": _media("Qwen3NextForCausalLM", _FUSED),
    "Qwen3_5MoeForConditionalGeneration": _media("Qwen3NextForCausalLM", _FUSED),
    "Gemma3ForConditionalGeneration": _media("Gemma3ForCausalLM", _OUT_PROJ),
    "Gemma4ForConditionalGeneration": _media("Gemma4ForCausalLM", _GEMMA4),
    "Mistral3ForConditionalGeneration": _media("MistralForCausalLM"),
    "LlavaForConditionalGeneration": _media("LlamaForCausalLM", _OUT_PROJ),
    "InternVLChatModel": _media("Qwen2ForCausalLM", _FUSED),
    "InternVLForConditionalGeneration": _media("Qwen2ForCausalLM"),
    "Llama4ForConditionalGeneration": _media("Llama4ForCausalLM"),
    "Glm4vMoeForConditionalGeneration": _media("Glm4MoeForCausalLM", _FUSED),
    "KimiK25ForConditionalGeneration": _media("DeepseekV3ForCausalLM", _MOONVIT),
    "WhisperForConditionalGeneration": _WHISPER,
}

QUANTIZED = frozenset(MEDIA) - {"Glm4vMoeForConditionalGeneration"}
"""Those whose decoders vLLM has been seen to fill from quantized rank files."""
QUANTIZED_TOWERS = frozenset(
    {
        "LlavaForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "WhisperForConditionalGeneration",
    }
)
"""And their towers, in fp8 with scales of channels; vLLM 0.32 does not load all others."""
