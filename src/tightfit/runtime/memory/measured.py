"""From a ledger's phases to the components of a plan."""

from collections.abc import Mapping

from tightfit.runtime.memory.cuda import CudaLedger
from tightfit.runtime.memory.ledger import MemoryLedger, Reading

_LOADING = ("process_baseline", "weights", "repacked_weights", "layers")
"""Matrices that are put into another order as layers are made are there twice for a moment."""
_BUFFERS = ("layers", "persistent_buffers")
"""Layers keep tables of their own, beside their weights."""


def components(ledger: MemoryLedger) -> dict[str, int]:
    """Bytes by the names of the plan's components."""
    if isinstance(ledger, CudaLedger):
        return _on_gpu(ledger)
    found = {"process_baseline": ledger.readings["process_baseline"].after_bytes}
    for name in ("weights", "repacked_weights", "kv_cache"):
        found[name] = ledger.readings[name].kept_bytes
    found["persistent_buffers"] = _buffers(ledger.readings)
    return found | _of_a_step(ledger.readings)


def most_resident_bytes(ledger: MemoryLedger) -> int:
    """The most that was held from the moment the weights were loaded."""
    if isinstance(ledger, CudaLedger):
        return ledger.most_used_bytes
    return max(r.peak_bytes for n, r in ledger.readings.items() if n not in _LOADING)


def loading_peak_bytes(ledger: MemoryLedger) -> int:
    """The most that was held until then."""
    return max(ledger.readings[name].peak_bytes for name in _LOADING)


def _buffers(readings: Mapping[str, Reading]) -> int:
    return sum(readings[name].kept_bytes for name in _BUFFERS)


def _of_a_step(readings: Mapping[str, Reading]) -> dict[str, int]:
    activations, logits = readings["activations"], readings["logits_and_sampler"]
    return {
        "activations": activations.transient_bytes,
        # Logits take the place of activations that are freed before, as in the plan.
        "logits_and_sampler": max(0, logits.highest_bytes - activations.highest_bytes),
    }


def _on_gpu(ledger: CudaLedger) -> dict[str, int]:
    """Tensors as the allocator counts them, and what else the driver shows."""
    readings, growth = ledger.readings, ledger.growth
    found = {
        # CUDA itself, and what libraries and kernels take when they are first used.
        "cuda_context": growth.get("cuda_context", 0) + growth["process_baseline"],
        "weights": readings["weights"].kept_bytes + readings["repacked_weights"].kept_bytes,
        "kv_cache": readings["kv_cache"].kept_bytes,
        "persistent_buffers": _buffers(readings),
        "cuda_graphs": growth["cuda_graphs"],
    }
    if "nccl" in growth:
        found["nccl"] = growth["nccl"]
    found |= _of_a_step(readings)
    # Blocks that are only partly used, and kernels that were loaded later.
    found["allocator_cache"] = max(0, ledger.most_used_bytes - sum(found.values()))
    return found
