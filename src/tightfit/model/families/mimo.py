"""MiMo-7B: Qwen2 with layers behind the last that predict further tokens, which are not loaded."""

from dataclasses import replace

from tightfit.model.config import Config
from tightfit.model.families import qwen2
from tightfit.model.spec import ModelSpec

ARCHITECTURES = ("MiMoForCausalLM",)


def spec(config: Config) -> ModelSpec:
    """vLLM builds it from Qwen2's layers (`models/mimo.py`)."""
    return replace(
        qwen2.spec(config),
        ignored_sources=(r"(^|\.)mtp_layers\.",),
        verified_for_sharding=False,
    )
