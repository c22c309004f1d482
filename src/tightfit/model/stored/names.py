"""vLLM's names of parameters in a state dict, family by family, for one layout of its modules.

Found by building vLLM's own models without weights and listing what its sharded-state loader wants
(`tests/vllm/test_state_names.py` asks again). Of tensors that several modules share only the
alphabetically first name is wanted, which makes the names of routers and shared experts odd.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Renames = tuple[tuple[str, str], ...]
"""Regular expressions of our names of parameters, and what takes their place."""

CONSTANTS = ("_k_scale", "_prob_scale", "_q_scale", "_v_scale")
"""float32 scalars, all 1.0, beside every attention layer."""

_GROUPED = ((r"^(.*)\.qkv_proj\.weight$", r"\1.attn"),)
_LATENT = ((r"^(.*)\.kv_b_proj\.weight$", r"\1.mla_attn.mla_attn"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyNames:
    """How one family's files differ from our names of parameters."""

    renamed: Renames = ()
    attention: Renames = _GROUPED
    """A parameter of every attention layer, and the module that has its constants."""


_EXPERTS: Renames = ((r"\.experts\.(w13|w2)_(\w+)$", r".experts.routed_experts.\1_\2"),)
_ROUTER: Renames = ((r"\.mlp\.gate\.(weight|e_score_correction_bias)$", r".mlp.experts.gate.\1"),)
"""The experts hold the router as well."""
_CORRECTION: Renames = (
    (
        r"\.mlp\.gate\.e_score_correction_bias$",
        ".mlp.experts.routed_experts.e_score_correction_bias",
    ),
)
_SHARED: Renames = (
    (r"\.shared_experts?\.(gate_up|down)_proj\.", r".experts._shared_experts._layer.\1_proj."),
    (r"\.shared_expert_gate\.", ".experts._shared_experts._layer.expert_gate."),
)
_GRANITE: Renames = (
    *_EXPERTS,
    (r"\.router\.layer\.", ".gate."),
    (r"\.shared_mlp\.gate_up_proj\.", ".shared_mlp.input_linear."),
    (r"\.shared_mlp\.down_proj\.", ".shared_mlp.output_linear."),
)
_INSIDE_MLA: Renames = (
    (r"\.self_attn\.(o_proj|q_proj|q_b_proj|q_a_layernorm)\.", r".self_attn.mla_attn.\1."),
)
_FALCON: Renames = ((r"\.qkv_proj\.", ".query_key_value."), (r"\.o_proj\.", ".dense."))
_OUT_PROJ: Renames = ((r"\.o_proj\.", ".out_proj."),)


def _names(*renames: Renames, attention: Renames = _GROUPED) -> FamilyNames:
    return FamilyNames(renamed=tuple(one for some in renames for one in some), attention=attention)


_PLAIN = _names(_EXPERTS)
_ROUTER_INSIDE = _names(_EXPERTS, _ROUTER, _SHARED)
_DEEPSEEK = _names(_EXPERTS, _ROUTER, _SHARED, _INSIDE_MLA, attention=_LATENT)

_SPECIAL: Mapping[str, FamilyNames] = {
    "Qwen2MoeForCausalLM": _names(_EXPERTS, _SHARED),
    "Qwen3MoeForCausalLM": _ROUTER_INSIDE,
    "Qwen3NextForCausalLM": _ROUTER_INSIDE,
    "DeepseekV2ForCausalLM": _DEEPSEEK,
    "DeepseekV3ForCausalLM": _DEEPSEEK,
    "Glm4MoeForCausalLM": _names(_EXPERTS, _CORRECTION, _SHARED),
    "Glm4MoeLiteForCausalLM": _names(
        _EXPERTS, _CORRECTION, _SHARED, _INSIDE_MLA, attention=_LATENT
    ),
    "Dots1ForCausalLM": _names(
        _EXPERTS,
        _ROUTER,
        (
            (
                r"\.shared_experts\.(gate_up|down)_proj\.",
                r".experts._shared_experts._layer.shared_experts.\1_proj.",
            ),
        ),
    ),
    "MiniCPM3ForCausalLM": _names(attention=((r"^(.*)\.kv_b_proj\.weight$", r"\1.attn"),)),
    "GraniteMoeForCausalLM": _names(_GRANITE),
    "GraniteMoeSharedForCausalLM": _names(_GRANITE),
    "GraniteMoeHybridForCausalLM": _names(_GRANITE),
    "GptOssForCausalLM": _names(
        _EXPERTS, ((r"\.self_attn\.", ".attn."), (r"^model\.embed_tokens\.", "model.embedding."))
    ),
    "Llama4ForCausalLM": _names(_EXPERTS, _SHARED),
    "GPT2LMHeadModel": _names(
        ((r"\.qkv_proj\.", ".c_attn."), (r"\.attn\.o_proj\.", ".attn.c_proj."))
    ),
    "GPTNeoXForCausalLM": _names(
        _FALCON, ((r"^gpt_neox\.", "model."), (r"^embed_out\.", "lm_head."))
    ),
    "OPTForCausalLM": _names(_OUT_PROJ),
    "GPTJForCausalLM": _names(_OUT_PROJ),
    "FalconForCausalLM": _names(_FALCON),
    "BloomForCausalLM": _names(_FALCON),
    "JambaForCausalLM": _names(_EXPERTS, ((r"\.self_attn\.", "."),)),
    "FalconH1ForCausalLM": _names(((r"\.mamba\.", ".mamba.mamba."),)),
}


def family_names(architecture: str) -> FamilyNames:
    """The names of a family, alone or with towers."""
    from tightfit.model.stored.media import MEDIA

    return MEDIA.get(architecture) or text_names(architecture)


def text_names(architecture: str) -> FamilyNames:
    """The names of a decoder; most have our own, but for the experts'."""
    return _SPECIAL.get(architecture, _PLAIN)


def constants(module: str) -> Iterator[str]:
    """The constants of an attention module."""
    return (f"{module}.{name}" for name in CONSTANTS)
