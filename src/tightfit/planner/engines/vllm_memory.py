"""Everything that a rank of vLLM holds beside weights and KV cache.

What counts against the budget depends on the version (`vllm_versions`); what is outside it lives in
the share of the device that `gpu_memory_utilization` leaves, and shows in the driver's own figure.
"""

from tightfit.planner.engines.vllm_buffers import after_load, block_tables, persistent_buffers
from tightfit.planner.engines.vllm_encoder import encoder
from tightfit.planner.engines.vllm_graphs import graphs
from tightfit.planner.engines.vllm_lora import lora
from tightfit.planner.engines.vllm_setting import Setting, calibration
from tightfit.planner.engines.vllm_step import step_bytes, step_components
from tightfit.planner.plan import Component


def components(setting: Setting) -> tuple[Component, ...]:
    """The lines of the budget, and those outside it."""
    found = [after_load(setting), *lora(setting)]
    steps = step_components(setting)
    step_peak = sum(component.planned_bytes for component in steps)
    found += [*steps, *encoder(setting, step_peak), persistent_buffers(setting)]
    if setting.runner == "v2":
        found.append(block_tables(setting))
    captured = graphs(setting)
    if captured is not None:
        found.append(captured)
    found += [_non_torch(setting), _context(setting)]
    if setting.talks:
        found.append(_nccl(setting))
    found.append(_cache(setting))
    return tuple(found)


def _non_torch(setting: Setting) -> Component:
    """Kernels that the driver loads after vLLM's first look at the device, and NCCL's growth."""
    data = calibration()
    key = "v1_experts" if setting.runner == "v1" and setting.has_experts else setting.runner
    if not setting.is_recent:
        key = "before_hopper"
    elif setting.rules.few_kernels:
        key = "before_0_20"
    alone = int(data["non_torch_bytes"][key])
    formula = f"{alone} measured for kernels loaded by runner {setting.runner}"
    several = 0
    if setting.talks:
        several = int(data["tensor_parallel"][_topology(setting)]["non_torch_bytes"])
        formula += f" + {several} measured for NCCL's growth with two ranks"
    slack = int(data["allocator_slack_bytes"]) if setting.rules.charges_buffers else 0
    if slack:
        formula += f" + {slack} for blocks that torch's allocator holds without using them"
    return Component(
        name="non_torch",
        planned_bytes=alone + several + slack,
        origin="calibrated",
        formula=formula + f" ({data['provenance']})",
    )


def _context(setting: Setting) -> Component:
    size = int(calibration()["cuda_context_bytes"])
    return Component(
        name="cuda_context",
        planned_bytes=size,
        origin="calibrated",
        formula=f"{size} measured on H100 and H200, before vLLM's first look at the device",
        inside_budget=setting.rules.charges_context,
    )


def _topology(setting: Setting) -> str:
    """What was measured for NCCL: on Hopper with NVLink, or from logs of older devices."""
    return "nvlink" if setting.is_recent else "before_hopper"


def _nccl(setting: Setting) -> Component:
    data = calibration()["tensor_parallel"][_topology(setting)]
    size = int(data["nccl_bytes"])
    formula = f"{size} measured with two ranks, before vLLM's first look at the device"
    if setting.has_experts:
        group = int(data["nccl_expert_group_bytes"])
        size += group
        formula += f" + {group} for the group of experts"
    return Component(
        name="nccl",
        planned_bytes=size,
        origin="calibrated",
        formula=formula,
        inside_budget=setting.rules.charges_nccl,
    )


def _cache(setting: Setting) -> Component:
    """What torch's allocator keeps of warming up the sampler, and of the first full step.

    The budget has set this aside as activations, or it fits into the sampler's cached blocks.
    """
    n, v = setting.rows, setting.vocab
    warm = 0
    if setting.samples:
        warm = 14 * n * v if setting.runner == "v1" else 8 * n * v
        if setting.tensor_parallel_size > 1 or setting.spec.logits_softcap is not None:
            warm += 2 * n * v * setting.element_bytes
    step, tensor = step_bytes(setting)
    reused = tensor <= 4 * n * v and setting.samples
    size = warm if reused else warm + step
    return Component(
        name="allocator_cache",
        planned_bytes=size,
        origin="derived",
        formula=f"the sampler's warm-up with N = {n}, V = {v}: {warm}"
        + (
            "; the tensors of a step fit into its blocks"
            if reused
            else f" + the tensors of a full step: {step}"
        ),
        inside_budget=False,
    )
