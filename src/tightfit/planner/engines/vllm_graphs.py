"""What CUDA graphs hold.

They share a pool that holds the tensors of the largest capture once, FlashAttention's split
accumulators first among them; the driver keeps the kernels' nodes, in proportion to graphs and
layers. Estimates: `profile_cudagraph_memory` of the runners.
"""

from collections.abc import Mapping

from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.base import Mixer
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.mlp import MoE
from tightfit.planner.engines.vllm_setting import Setting, arithmetic, calibration, mixer_widths
from tightfit.planner.engines.vllm_step import CUBLAS_WORKSPACE, moe_workspace
from tightfit.planner.plan import Component
from tightfit.units import MiB, cdiv

SPLITS = 32
"""VLLM_FLASH_ATTN_MAX_NUM_SPLITS_FOR_CUDA_GRAPH."""


def graphs(setting: Setting) -> Component | None:
    """The graphs of a rank, and what of them the budget pays for; None if none are captured."""
    sizes = setting.capture_sizes
    if not sizes:
        return None
    captured, terms = _captured(setting)
    v2, rules = setting.runner == "v2", setting.rules
    inside = rules.v2_measures_graphs if v2 else rules.graphs_in_budget
    charged = captured
    if inside:
        charged = _estimate_v2(setting) if v2 else _estimate_v1(setting)
    full = len(_full_sizes(setting))
    pieces = len(_piecewise_sizes(setting))
    formula = f"{pieces} piecewise and {full} full graphs up to {sizes[-1]} tokens: {terms}"
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
    """Full graphs are captured for batches of decodes only, unless there are no others."""
    if not setting.cudagraph_mode.startswith("FULL"):
        return []
    if setting.cudagraph_mode == "FULL":
        return list(setting.capture_sizes)
    return [size for size in setting.capture_sizes if size <= setting.max_num_seqs]


def _piecewise_sizes(setting: Setting) -> tuple[int, ...]:
    return setting.capture_sizes if setting.cudagraph_mode.endswith("PIECEWISE") else ()


def _accumulators(setting: Setting) -> int:
    """FlashAttention's partial results: splits x tokens x query features x float32."""
    largest = max(_full_sizes(setting), default=0)
    features = max((_attended(mixer, setting) for mixer in setting.mixers), default=0)
    return SPLITS * largest * features * 4


def _attended(mixer: Mixer, setting: Setting) -> int:
    """Features that attention gives back for a token, before they are projected."""
    if isinstance(mixer, LatentAttention):
        # The absorbed form sums latents, and the V1 runner captures it twice.
        copies = 2 if setting.runner == "v1" else 1
        return copies * mixer.heads(mixer.kv_lora_rank).span(setting.rank)[1]
    return mixer_widths(mixer, setting.rank)[0] if not mixer.is_recurrent else 0


def _step(setting: Setting) -> int:
    """The tensors of a layer at the largest captured size."""
    widths = []
    for layer in setting.layers:
        q, kv = setting.widths(layer)
        inner = 0 if isinstance(layer.mlp, MoE) else 3 * setting.inner(layer)
        widths.append(6 * setting.spec.hidden_size + max(inner, 3 * q + 3 * kv))
    return setting.capture_sizes[-1] * max(widths) * setting.element_bytes


def _driver(setting: Setting) -> int:
    pieces = len(_piecewise_sizes(setting)) * _piecewise(setting)
    cases = 2 if setting.options.enable_lora else 1
    return cases * (pieces + len(_full_sizes(setting)) * _full(setting))


def _splits(setting: Setting) -> int:
    """Layers at which a piecewise graph is interrupted."""
    return sum(bool(layer.mixers) for layer in setting.layers)


def _piecewise(setting: Setting) -> int:
    """What the driver keeps of one piecewise graph: a small graph per layer."""
    data = calibration()["graphs"]
    each = int(data["driver_bytes_per_piecewise_layer"])
    return int(data["driver_bytes_per_piecewise"]) + each * _splits(setting)


def _full(setting: Setting) -> int:
    """What the driver keeps of one full graph."""
    return int(calibration()["graphs"]["driver_bytes_per_full_layer"]) * _splits(setting)


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
    factor = _split_factor(setting) if setting.runner == "v2" else 1
    held, pool, driver = int(accumulators * factor), _pool(setting), _driver(setting)
    terms = (
        f"{factor} x {accumulators} for FlashAttention's {SPLITS} splits + {pool} for the tensors "
        f"of a layer and cuBLAS + {driver} in the driver"
    )
    return held + pool + driver, terms


def _split_factor(setting: Setting) -> float:
    """How often the accumulators are held: more than once where heads share keys by more than two.

    (FlashAttention then packs the heads of a group into rows of one tile.)
    """
    factors: Mapping[str, float] = calibration()["graphs"]["v2_split_workspace_factor"]
    shared = any(
        isinstance(mixer, LatentAttention)
        or (isinstance(mixer, Attention) and mixer.num_heads > 2 * mixer.num_kv_heads)
        for layer in setting.kinds
        for mixer in layer.mixers
    )
    return factors["shared_keys" if shared else "own_keys"]


def _estimate_v2(setting: Setting) -> int:
    """All piecewise graphs, and the largest two full ones with the second one repeated."""
    kept = len(_piecewise_sizes(setting)) * _piecewise(setting)
    kept += len(_full_sizes(setting)) * max(_full(setting), MiB)
    return _accumulators(setting) + _pool(setting) + kept


def _estimate_v1(setting: Setting) -> int:
    """The larger of both first captures, and the second of each kind times the others.

    Seconds as measured: the driver grows by whole 2 MiB, or not at all below 16 layers.
    """
    layers = _splits(setting)
    piecewise = 2 * MiB * cdiv(layers, 16) if layers >= 16 else MiB
    full = 2 * MiB if layers >= 40 else MiB
    working = _step(setting) + 2 * CUBLAS_WORKSPACE + _chosen_experts(setting)
    first = max(_tried_accumulators(setting), working) + _kernel_growth(setting)
    pieces, count = len(_piecewise_sizes(setting)), len(_full_sizes(setting))
    return first + max(pieces - 1, 0) * piecewise + max(count - 1, 0) * full


def _tried_accumulators(setting: Setting) -> int:
    """On trial, attention with sinks takes the kernel that does not split."""
    if any(isinstance(mixer, Attention) and mixer.sinks for mixer in setting.mixers):
        return 0
    return _accumulators(setting) + 2 * MiB


def _chosen_experts(setting: Setting) -> int:
    """The experts' tensors, where they are not in the shared workspace: gpt-oss."""
    sizes = [
        setting.capture_sizes[-1] * layer.mlp.top_k * 3 * setting.inner(layer)
        for layer in setting.kinds
        if isinstance(layer.mlp, MoE) and not moe_workspace(setting)
    ]
    return max(sizes, default=0) * setting.element_bytes


def _kernel_growth(setting: Setting) -> int:
    """Kernels that are first loaded during the trial, by models that have their own."""
    own = arithmetic(setting.spec) == "fp8_block" or any(
        mixer.is_recurrent or isinstance(mixer, LatentAttention)
        for layer in setting.kinds
        for mixer in layer.mixers
    )
    return int(calibration()["graphs"]["v1_own_kernels_bytes"]) if own else 0
