"""The processes of a vLLM deployment, and what they take before they hold anything of a model.

Measured with vLLM 0.32.0 (CPU build, torch 2.13, Python 3.11, x86-64; `/proc/PID/smaps_rollup` of
an API server, its engine core and its workers, started on a model of a few MB and on one of 1.2
GiB, with 1 and 2 ranks). What CUDA adds to a worker was measured step by step with torch
2.11.0+cu130 on an H200 (driver 580), not within a worker of vLLM.
"""

from dataclasses import dataclass

from tightfit.model.layout import Parallel
from tightfit.planner.options import PlanOptions
from tightfit.units import MiB, format_bytes

PROCESS_BYTES = 414 * MiB
"""Private memory of an API server (414 MiB), an engine core (405 MiB), or whoever imports vLLM."""
LIBRARY_BYTES = {"cpu": 190 * MiB, "cuda": 486 * MiB}
"""Mapped files of torch, CUDA and the like, which all processes of a host share."""
BASELINE_PROVENANCE = "measured with vLLM 0.32.0 (CPU build) and torch 2.11+cu130 on an H200"

COMPILED_BYTES = 185 * MiB
"""What inductor leaves in a worker that compiled its model."""
_WORKER = {"cpu": 487 * MiB, "cuda": (414 + 219) * MiB}
"""On CUDA: a process and what its context, cuBLAS and first kernels add. On a CPU 427 MiB, and 60
that malloc keeps of loading."""
_SEVERAL = {"cpu": 95 * MiB, "cuda": 328 * MiB}
"""gloo and buffers in shared memory; NCCL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """How many processes a deployment has on one host."""

    front: int
    """API servers, or the program that uses the `LLM` class."""
    cores: int
    workers: int
    others: int
    """The parent of several API servers, and the coordinator of several engines."""
    separate_workers: bool
    """A single rank on a GPU runs inside its engine core (`UniProcExecutor`)."""

    @classmethod
    def of(cls, parallel: Parallel, options: PlanOptions, *, cpu: bool) -> "Processes":
        """`entrypoints/cli/serve.py`, `v1/engine/utils.py`, `v1/executor/`."""
        replicas = parallel.data_parallel_size
        server = options.entrypoint == "server"
        front = (options.api_server_count or replicas) if server else 1
        return cls(
            front=front,
            cores=replicas,
            workers=replicas * parallel.world_size,
            others=(front > 1) + (replicas > 1),
            separate_workers=cpu or parallel.world_size > 1,
        )


def worker_bytes(*, cpu: bool, eager: bool, several: bool) -> tuple[int, str]:
    """Private memory of a worker before weights and KV cache, and how it is made up."""
    kind = "cpu" if cpu else "cuda"
    parts = {"worker" if cpu else "worker with a CUDA context": _WORKER[kind]}
    if not eager:
        parts["compiler"] = COMPILED_BYTES
    if several:
        parts["gloo" if cpu else "NCCL"] = _SEVERAL[kind]
    text = " + ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return sum(parts.values()), text
