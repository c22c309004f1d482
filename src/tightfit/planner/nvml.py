"""The GPUs of this machine as NVIDIA's management library knows them, without a CUDA context.

Reading the library costs milliseconds, takes no memory of the device, and also tells what other
processes hold there. Source of structures and names: NVIDIA's nvml.h.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tightfit.errors import UsageError
from tightfit.planner.devices import Device

_LIBRARY = "libnvidia-ml.so.1"
_MEMORY_V2 = 2 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU that CUDA may use: `total_bytes` is what a process can allocate of it."""

    name: str
    total_bytes: int
    used_bytes: int
    """By all processes now."""
    capability: tuple[int, int] | None
    """None if the driver does not tell, as for a part of a GPU (MIG)."""

    def device(self) -> Device:
        """The GPU as a plan sees it."""
        return Device(
            name=self.name, total_bytes=self.total_bytes, kind="cuda", capability=self.capability
        )


class _Memory(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; none without a driver."""
    with _library() as nvml:
        if nvml is None:
            return ()
        return tuple(_gpu(nvml, handle) for handle in _handles(nvml))


def this_gpu(index: int = 0) -> Gpu:
    """One of the visible GPUs.

    Raises:
        UsageError: there is no such GPU.
    """
    found = visible_gpus()
    if index < len(found):
        return found[index]
    raise UsageError(
        f"there is no GPU {index}: NVIDIA's driver shows {len(found)}",
        hint="see nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu",
    )


@contextmanager
def _library() -> Iterator[ctypes.CDLL | None]:
    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError:
        yield None
        return
    if nvml.nvmlInit_v2() != 0:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _handles(nvml: ctypes.CDLL) -> list[ctypes.c_void_p]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        names = [str(i) for i in range(count.value)]
    else:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    handles: list[ctypes.c_void_p] = []
    for name in names:
        handle = ctypes.c_void_p()
        if name.isdigit():
            status = nvml.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(handle))
        else:
            status = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        if status != 0:
            # CUDA ignores what follows a name that it does not know.
            break
        handles.append(handle)
    return handles


def _gpu(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> Gpu:
    name = ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
    major, minor = ctypes.c_int(), ctypes.c_int()
    told = nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    memory = _Memory(version=ctypes.sizeof(_Memory) | _MEMORY_V2)
    status = nvml.nvmlDeviceGetMemoryInfo_v2(handle, ctypes.byref(memory))
    if status != 0:
        raise UsageError(
            f"the driver does not tell the memory of {name.value.decode()} (NVML status {status})",
            hint="drivers before 510 cannot: update it, or plan with --gpu-memory",
        )
    return Gpu(
        name=name.value.decode(errors="replace"),
        total_bytes=memory.total - memory.reserved,
        used_bytes=memory.used,
        capability=(major.value, minor.value) if told == 0 else None,
    )
