"""What differs between the modelled versions of vLLM.

Read in the sources of 0.25.1 and 0.32.0: `v1/worker/gpu_worker.py: determine_available_memory`,
`v1/worker/gpu/model_runner.py`, `v1/worker/gpu/sample/sampler.py`, `config/vllm.py`,
`v1/kv_cache_interface.py` and `engine/arg_utils.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tightfit.errors import UsageError
from tightfit.model.blocks.mlp import MoE
from tightfit.model.spec import ModelSpec

DEFAULT_VERSION = "0.32.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How one version counts."""

    version: str
    charges_buffers: bool
    """The budget pays for whatever is on the device after the profile run, hence also for the
    buffers made between loading and profiling; before 0.27 only for weights and growth."""
    v2_measures_graphs: bool
    """The V2 runner captures graphs on trial and subtracts them; a stub before 0.32."""
    v2_for_experts: bool
    """The V2 runner also serves mixtures of experts."""
    v2_profile_copies_logits: bool
    """The V2 sampler copies logits to float32 even when no request asks for processing."""
    steps_in_flight: bool
    """A sliding window reserves room for all overlapping steps, not for one."""
    null_block: int
    """Blocks held back in the check that one sequence fits."""
    large_server_tokens: int
    """max_num_batched_tokens of the server on devices of 160 GiB and more."""


_RULES: Mapping[str, Rules] = {
    rules.version: rules
    for rules in (
        Rules(
            version="0.25.1",
            charges_buffers=False,
            v2_measures_graphs=False,
            v2_for_experts=False,
            v2_profile_copies_logits=True,
            steps_in_flight=False,
            null_block=0,
            large_server_tokens=8192,
        ),
        Rules(
            version="0.32.0",
            charges_buffers=True,
            v2_measures_graphs=True,
            v2_for_experts=True,
            v2_profile_copies_logits=False,
            steps_in_flight=True,
            null_block=1,
            large_server_tokens=16384,
        ),
    )
}


def rules_of(version: str | None) -> Rules:
    """The rules of a version, or of the newest one that is modelled.

    Raises:
        UsageError: a version that is not modelled.
    """
    if (version or DEFAULT_VERSION) not in _RULES:
        raise UsageError(f"vLLM {version} is not modelled", hint="modelled: " + ", ".join(_RULES))
    return _RULES[version or DEFAULT_VERSION]


def default_runner(rules: Rules, spec: ModelSpec) -> str:
    """The model runner that serves a model unless VLLM_USE_V2_MODEL_RUNNER says otherwise."""
    experts = any(isinstance(layer.mlp, MoE) for layer in spec.layers)
    return "v2" if rules.v2_for_experts or not experts else "v1"
