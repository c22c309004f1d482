"""CUDA graphs: which sizes vLLM captures, and what they hold.

Sizes: `config/vllm.py: _set_cudagraph_sizes`. Memory: graphs share a pool that holds the tensors of
the largest capture once, FlashAttention's split accumulators first among them; the driver keeps the
kernels' nodes, in proportion to graphs and layers. Estimates: `profile_cudagraph_memory` of the
runners.
"""

from tightfit.errors import UsageError
from tightfit.model.blocks.mlp import MoE
from tightfit.planner.engines.vllm_setting import Setting, calibration
from tightfit.planner.engines.vllm_step import CUBLAS_WORKSPACE
from tightfit.planner.plan import Component
from tightfit.units import MiB, cdiv

SPLITS = 32
"""VLLM_FLASH_ATTN_MAX_NUM_SPLITS_FOR_CUDA_GRAPH."""


def capture_sizes(
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    given: tuple[int, ...] | None = None,
    maximum: int | None = None,
    limit: int = 512,
    with_limits: bool = True,
) -> tuple[int, ...]:
    """The batch sizes that are captured.

    With `with_limits` the largest batches themselves are added where the pattern misses them.

    Raises:
        UsageError: sizes that contradict each other.
    """
    if given is not None:
        sizes = tuple(sorted({size for size in given if size <= max_num_batched_tokens}))
        if maximum is not None and (not sizes or sizes[-1] != maximum):
            raise UsageError(
                f"--max-cudagraph-capture-size {maximum} is not the largest of "
                f"--cudagraph-capture-sizes {' '.join(map(str, given))}",
                hint="give one of them",
            )
        return sizes
    top = min(maximum or min(2 * max_num_seqs, limit), max_num_batched_tokens)
    found = {size for size in (1, 2, 4, *range(8, 256, 8)) if size <= top}
    found |= set(range(256, top + 1, 16))
    if with_limits:
        found |= {max_num_batched_tokens} & set(range(top + 1))
        if maximum is None:
            found |= {max_num_seqs} & set(range(top + 1))
    return tuple(sorted(found))


def graphs(setting: Setting) -> Component | None:
    """The graphs of a rank, and what of them the budget pays for; None if none are captured."""
    sizes = setting.capture_sizes
    if not sizes:
        return None
    captured, terms = _captured(setting)
    if setting.runner == "v2":
        charged = _estimate_v2(setting) if setting.rules.v2_measures_graphs else captured
        inside = setting.rules.v2_measures_graphs
    else:
        charged, inside = _estimate_v1(setting), True
    full = len(_full_sizes(setting))
    formula = f"{len(sizes)} piecewise and {full} full graphs up to {sizes[-1]} tokens: {terms}"
    if inside:
        formula += f" = {captured}; vLLM's estimate, which it subtracts: {charged}"
    return Component(
        name="cuda_graphs",
        planned_bytes=charged,
        origin="calibrated",
        formula=formula,
        inside_budget=inside,
        detail={"resident_bytes": captured},
    )


def _full_sizes(setting: Setting) -> list[int]:
    """Full graphs are captured for batches of decodes only."""
    return [size for size in setting.capture_sizes if size <= setting.max_num_seqs]


def _accumulators(setting: Setting) -> int:
    """FlashAttention's partial results: splits x tokens x query features x float32."""
    largest = max(_full_sizes(setting), default=0)
    features = max(setting.heads(layer)[0] for layer in setting.layers)
    return SPLITS * largest * features * 4


def _step(setting: Setting) -> int:
    """The tensors of a layer at the largest captured size."""
    widths = []
    for layer in setting.layers:
        q, kv = setting.heads(layer)
        inner = 0 if isinstance(layer.mlp, MoE) else 3 * setting.inner(layer)
        widths.append(6 * setting.spec.hidden_size + max(inner, 3 * q + 3 * kv))
    return setting.capture_sizes[-1] * max(widths) * setting.element_bytes


def _driver(setting: Setting) -> int:
    return len(setting.capture_sizes) * _piecewise(setting) + len(_full_sizes(setting)) * _full(
        setting
    )


def _piecewise(setting: Setting) -> int:
    """What the driver keeps of one piecewise graph: a small graph per layer."""
    data = calibration()["graphs"]
    each = int(data["driver_bytes_per_piecewise_layer"])
    return int(data["driver_bytes_per_piecewise"]) + each * len(setting.layers)


def _full(setting: Setting) -> int:
    """What the driver keeps of one full graph."""
    return int(calibration()["graphs"]["driver_bytes_per_full_layer"]) * len(setting.layers)


def _pool(setting: Setting) -> int:
    """What both pools gain besides the accumulators."""
    data = calibration()["graphs"]
    fixed: int = CUBLAS_WORKSPACE + data["default_pool_bytes"]
    if setting.runner == "v2":
        hidden = setting.capture_sizes[-1] * setting.spec.hidden_size * setting.element_bytes
        return fixed + CUBLAS_WORKSPACE + hidden + int(data["v2_slack_bytes"]) + _step(setting)
    return fixed + int(data["v1_slack_bytes"]) + _step(setting)


def _captured(setting: Setting) -> tuple[int, str]:
    accumulators = _accumulators(setting)
    factor = calibration()["graphs"]["v2_split_workspace_factor"] if setting.runner == "v2" else 1
    held, pool, driver = int(accumulators * factor), _pool(setting), _driver(setting)
    terms = (
        f"{factor} x {accumulators} for FlashAttention's {SPLITS} splits + {pool} for the tensors "
        f"of a layer and cuBLAS + {driver} in the driver"
    )
    return held + pool + driver, terms


def _estimate_v2(setting: Setting) -> int:
    """All piecewise graphs, and the largest two full ones with the second one repeated."""
    kept = len(setting.capture_sizes) * _piecewise(setting)
    kept += len(_full_sizes(setting)) * max(_full(setting), MiB)
    return _accumulators(setting) + _pool(setting) + kept


def _estimate_v1(setting: Setting) -> int:
    """The larger of both first captures, and the second of each kind times the others.

    Seconds as measured: the driver grows by whole 2 MiB, or not at all below 16 layers.
    """
    layers = len(setting.layers)
    piecewise = 2 * MiB * cdiv(layers, 16) if layers >= 16 else MiB
    full = 2 * MiB if layers >= 40 else MiB
    first = max(_accumulators(setting) + 2 * MiB, _step(setting) + 2 * CUBLAS_WORKSPACE)
    count = len(_full_sizes(setting))
    return first + (len(setting.capture_sizes) - 1) * piecewise + max(count - 1, 0) * full
