"""CUDA graphs of decode steps: one for each planned number of sequences, in one memory pool.

A step of single tokens takes the next larger graph; its spare places are sequences of length 0,
which attention passes over. Graphs read their inputs from the buffers of `CudaStaging` and write
the residual stream into one buffer that all share.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tightfit.runtime.batch import Batch, Step


class DecodeGraphs:
    """Captured forward passes.

    Args:
        sizes: numbers of sequences.
        forward: gives the residual stream of a batch, [tokens, hidden].
        hidden: [the largest size, hidden], where graphs leave their result, and where they find
            that of the pipeline stage before.
    """

    def __init__(
        self, sizes: Sequence[int], forward: Callable[[Batch], Tensor], hidden: Tensor
    ) -> None:
        self.sizes = sorted(sizes)
        self._forward = forward
        self.hidden = hidden
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self, empty: Callable[[int], Batch]) -> None:
        """Record all graphs, the largest first, so that the others fit into its memory.

        Args:
            empty: gives the batch of a size, whose tensors the graph will read.
        """
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self.sizes):
            batch = empty(size)
            # Kernels are compiled and libraries choose algorithms at their first call, which
            # cannot be captured.
            self._forward(batch)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # NCCL's watchdog looks at events meanwhile, in a thread of its own.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.hidden[:size].copy_(self._forward(batch))
            self._graphs[size] = graph

    def forget(self) -> None:
        """Give all graphs back; NCCL waits for those that its collectives are in before it ends."""
        self._graphs.clear()
        if self.hidden.is_cuda:
            torch.cuda.synchronize(self.hidden.device)

    def size_of(self, step: Step) -> int | None:
        """Places of the graph that can run a step; None if there is none."""
        spans = step.spans
        if not self._graphs or len(spans) > self.sizes[-1]:
            return None
        # Single tokens come first.
        if spans[-1].count > 1:
            return None
        return self.sizes[bisect_left(self.sizes, len(spans))]

    def replay(self, size: int) -> Tensor:
        """Run what was put into the buffers: the residual stream, [size, hidden]."""
        self._graphs[size].replay()
        return self.hidden[:size]
