"""Measuring what a run takes of a GPU, phase by phase.

PyTorch's allocator knows its own tensors to the byte; the driver knows what is used in all, which
is more: CUDA's context, kernels, NCCL's buffers, and memory that the allocator keeps for later.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tightfit.planner.nvml import this_gpu
from tightfit.runtime.memory.ledger import Reading

# torch 2.11 warns of the old name.
_set_allocator = getattr(
    torch._C, "_accelerator_setAllocatorSettings", torch.cuda.memory._set_allocator_settings
)


class CudaLedger:
    """`MemoryLedger` of one GPU; it should be made before anything else uses the GPU.

    `readings` are of the allocator's tensors. `growth` is what each phase added to what the driver
    says is used.

    Raises:
        UsageError: there is no such GPU.
    """

    def __init__(self, index: int) -> None:
        # Fragments of blocks that were split would count as used; segments that grow have none.
        _set_allocator("expandable_segments:True")
        self.readings: dict[str, Reading] = {}
        self.growth: dict[str, int] = {}
        self.most_used_bytes = 0
        self._device = torch.device("cuda", index)
        gpu = this_gpu(index)
        self.total_bytes = gpu.total_bytes
        self._others_bytes = gpu.used_bytes
        self._started = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        assert name not in self.readings, f"phase {name} twice"
        used, before = self.resident_bytes(), 0
        if self._started:
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
        yield
        self._started = True
        now = self.resident_bytes()
        self.most_used_bytes = max(self.most_used_bytes, now)
        self.growth[name] = now - used
        self.readings[name] = Reading(
            before_bytes=before,
            after_bytes=torch.cuda.memory_allocated(self._device),
            peak_bytes=torch.cuda.max_memory_allocated(self._device),
        )

    def resident_bytes(self) -> int:
        """What this process makes the driver show as used."""
        if not self._started:
            return 0
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - self._others_bytes

    def release(self) -> None:
        """Give back what the allocator keeps for later, so that a later phase shows its own."""
        torch.cuda.empty_cache()
