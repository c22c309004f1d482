"""What LoRA adapters take of a device: slots for `max_loras` of them in every linear layer.

(`lora/layers/`: `create_lora_weights`.)
"""

from tightfit.model.layout import Cut, Weight, on_rank
from tightfit.model.parameters import plain_parameters
from tightfit.planner.engines.vllm_setting import Setting
from tightfit.planner.plan import Component


def lora(setting: Setting) -> list[Component]:
    """One component, if adapters are enabled.

    Matrix A (rank x inputs) is held once for each matrix that a layer fuses, B (outputs x rank)
    once; both are cut as their layer is, and A of a column parallel layer is whole on every rank.
    """
    options = setting.options
    if not options.enable_lora:
        return []
    elements = sum(
        _elements(weight, setting)
        for weight in plain_parameters(setting.spec)
        if weight.linear
        and isinstance(weight.where, int)
        and on_rank(weight, setting.rank, setting.spec.num_layers)
    )
    size = options.max_loras * options.max_lora_rank * elements * setting.element_bytes
    return [
        Component(
            name="lora",
            planned_bytes=size,
            origin="derived",
            formula=f"max_loras x max_lora_rank x (inputs of each matrix + outputs) x b = "
            f"{options.max_loras} x {options.max_lora_rank} x {elements} x "
            f"{setting.element_bytes}",
        )
    ]


def _elements(weight: Weight, setting: Setting) -> int:
    """Rows and columns of A and B for a rank of one."""
    *experts, rows, columns = weight.rank_shape(setting.rank)
    slices = len(weight.parts) if weight.cut is Cut.OUTPUT else 1
    return (experts[0] if experts else 1) * (slices * columns + rows)
