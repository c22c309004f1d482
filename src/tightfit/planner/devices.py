"""GPUs and how much memory their driver reports, which is less than the brochure's figure."""

from collections.abc import Mapping
from dataclasses import dataclass

from tightfit.errors import UsageError
from tightfit.units import GiB, KiB, parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device of a rank; `kind` is `cuda`, `rocm` or `cpu`."""

    name: str
    total_bytes: int
    kind: str = "cuda"


def _gib(value: float) -> int:
    return int(value * GiB)


CATALOGUE: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device(name="t4-16gb", total_bytes=_gib(14.56)),
        Device(name="l4-24gb", total_bytes=_gib(22.03)),
        Device(name="a10-24gb", total_bytes=_gib(22.06)),
        Device(name="l40s-48gb", total_bytes=_gib(44.39)),
        Device(name="a100-40gb", total_bytes=_gib(39.39)),
        Device(name="a100-80gb", total_bytes=_gib(79.15)),
        Device(name="h100-80gb", total_bytes=_gib(79.18)),
        Device(name="h200-141gb", total_bytes=_gib(139.80)),
        Device(name="b200-180gb", total_bytes=_gib(178.35)),
        Device(name="rtx3090-24gb", total_bytes=_gib(23.57)),
        Device(name="rtx4090-24gb", total_bytes=_gib(23.53)),
        Device(name="rtx5090-32gb", total_bytes=_gib(31.35)),
        Device(name="mi300x-192gb", total_bytes=_gib(191.98), kind="rocm"),
    )
}
"""Totals as start-up logs print them (`torch.cuda.mem_get_info`)."""


def device(gpu: str | None, gpu_memory: str | None) -> Device | None:
    """The device that the options name; None when they name none.

    Raises:
        UsageError: an unknown name, or both options.
    """
    if gpu is not None and gpu_memory is not None:
        raise UsageError("--gpu and --gpu-memory contradict each other", hint="give one of them")
    if gpu_memory is not None:
        total_bytes = parse_bytes(gpu_memory)
        if total_bytes < GiB // 8:
            raise UsageError(
                f"--gpu-memory {gpu_memory} is less than any GPU has", hint="write it as 24GiB"
            )
        return Device(name=f"a GPU with {gpu_memory}", total_bytes=total_bytes)
    if gpu is None:
        return None
    if gpu.lower() not in CATALOGUE:
        raise UsageError(
            f"unknown GPU {gpu!r}",
            hint="known: " + ", ".join(CATALOGUE) + "; or use --gpu-memory 24GiB",
        )
    return CATALOGUE[gpu.lower()]


def this_machine() -> Device:
    """The memory of this machine, or of the container that holds us (Linux).

    Raises:
        UsageError: the machine does not say.
    """
    total_bytes = 0
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            total_bytes = next(
                int(line.split()[1]) * KiB for line in lines if line.startswith("MemTotal:")
            )
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            text = limit.read().strip()
            total_bytes = min(total_bytes, int(text)) if text.isdigit() else total_bytes
    except (OSError, StopIteration, ValueError):
        if not total_bytes:
            raise UsageError(
                "cannot tell the memory of this machine", hint="give it with --gpu-memory 16GiB"
            ) from None
    return Device(name="cpu", total_bytes=total_bytes, kind="cpu")
