"""Qwen3-VL over Qwen3, dense and with experts, and Qwen3.5 over its hybrid decoder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tightfit.model.blocks.mlp import ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import Layer, ModelSpec
from tightfit.model.towers.qwen_vl import qwen3_tower


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """The decoder, and after which layers the tower merges unless the config says."""

    decoder: str
    deepstack: tuple[int, ...] = ()


_KINDS: Mapping[str, _Kind] = {
    "Qwen3VLForConditionalGeneration": _Kind(decoder="Qwen3ForCausalLM", deepstack=(8, 16, 24)),
    "Qwen3VLMoeForConditionalGeneration": _Kind(
        decoder="Qwen3MoeForCausalLM", deepstack=(8, 16, 24)
    ),
    "Qwen3_5ForConditionalGeneration": _Kind(decoder="Qwen3_5ForCausalLM"),
    "Qwen3_5MoeForConditionalGeneration": _Kind(decoder="Qwen3_5MoeForCausalLM"),
}
ARCHITECTURES = tuple(_KINDS)

_STACKED = ExpertNames(
    gate_up="experts.gate_up_proj", down="experts.down_proj", stacked=True, transposed=True
)


def spec(config: Config) -> ModelSpec:
    """Checkpoints of Qwen3-VL with experts hold them stacked and transposed."""
    architecture = config.strings("architectures")[0]
    kind = _KINDS[architecture]
    text = text_spec(config, kind.decoder)
    if architecture == "Qwen3VLMoeForConditionalGeneration":
        text = replace(text, layers=tuple(map(_stacked, text.layers)))
    tower = qwen3_tower(config, kind.deepstack)
    return nested(text, "model.language_model", "lm_head", (tower,), verified=True)


def _stacked(layer: Layer) -> Layer:
    if not isinstance(layer.mlp, MoE):
        return layer
    return replace(layer, mlp=replace(layer.mlp, names=_STACKED))
