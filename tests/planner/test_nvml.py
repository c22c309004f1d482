"""Which GPUs are seen, with a library that stands in for NVIDIA's."""

import ctypes
from typing import Any

import pytest

from tightfit.errors import UsageError
from tightfit.planner import nvml
from tightfit.units import GiB

NAMES = ("A", "B", "MIG-1")


class Library:
    """Three devices by number, by `GPU-<letter>`, and a part of one."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle._obj.value = index + 1
        return 0 if index < 2 else 2

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        known = {b"GPU-A": 1, b"GPU-B": 2, b"MIG-1": 3}
        handle._obj.value = known.get(name)
        return 0 if name in known else 6

    def nvmlDeviceGetName(self, handle: Any, name: Any, _: Any) -> int:
        name.value = NAMES[handle.value - 1].encode()
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        if handle.value == 3:
            return 3
        major._obj.value, minor._obj.value = 9, 0
        return 0

    def nvmlDeviceGetMemoryInfo_v2(self, handle: Any, memory: Any) -> int:
        assert memory._obj.version == ctypes.sizeof(nvml._Memory) | 2 << 24
        memory._obj.total, memory._obj.reserved, memory._obj.used = 81 * GiB, GiB, 3 * GiB
        return 0


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda _: Library())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["A", "B"]),
        ("1,0", ["B", "A"]),
        (" 1 ", ["B"]),
        ("", []),
        ("-1", []),
        ("0,7,1", ["A"]),
        ("GPU-B,GPU-A", ["B", "A"]),
        ("MIG-1", ["MIG-1"]),
    ],
)
def test_what_cuda_would_use(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in nvml.visible_gpus()] == names


def test_a_gpu_as_a_plan_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = nvml.this_gpu(1)
    assert (gpu.total_bytes, gpu.used_bytes) == (80 * GiB, 3 * GiB)
    assert gpu.device().capability == (9, 0)
    with pytest.raises(UsageError, match="there is no GPU 2"):
        nvml.this_gpu(2)
    # The driver does not tell the capability of a part, which is no reason to think it old.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    part = nvml.this_gpu().device()
    assert part.capability is None
    assert part.bfloat16


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError

    monkeypatch.setattr(nvml.ctypes, "CDLL", missing)
    assert nvml.visible_gpus() == ()
