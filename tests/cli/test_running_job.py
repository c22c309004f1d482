"""What a run says when the device is the matter, without one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tightfit.cli.running import job as running
from tightfit.cli.running.generate import _left, _summary
from tightfit.errors import DeviceError
from tightfit.planner.nvml import Gpu
from tightfit.runtime.device_errors import building_kernels, told, usable
from tightfit.units import GiB

_OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB of "
    "which 1.00 GiB is free. Including non-PyTorch memory, this process has 3 GiB in use."
)


def job(*, used_by_plan: float = 0.0) -> Any:
    size = SimpleNamespace(value=1)
    return SimpleNamespace(
        plan=SimpleNamespace(
            device=SimpleNamespace(kind="cpu"),
            options=SimpleNamespace(pipeline_parallel_size=size),
            ranks=[SimpleNamespace(driver_used_bytes=int(used_by_plan * GiB))],
        )
    )


def test_memory_that_runs_out_is_no_bug() -> None:
    def allocate(_: object) -> None:
        raise torch.OutOfMemoryError(_OUT_OF_MEMORY)

    with pytest.raises(DeviceError, match=r"Tried to allocate 2.00 GiB.*1.00 GiB is free.$") as e:
        running.in_world(job(), allocate)
    assert "--gpu-memory-utilization" in (e.value.hint or "")
    assert e.value.exit_code == 1


def test_a_kernel_that_needs_more_than_a_gpu_has_is_no_bug() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    found = told(errors.OutOfResources(114688, 101376, "shared memory"))
    assert found is not None
    assert "Required: 114688, Hardware limit: 101376" in found.message


def test_bugs_stay_bugs() -> None:
    def wrong(_: object) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        running.in_world(job(), wrong)


def test_what_the_first_use_of_a_gpu_shows() -> None:
    with pytest.raises(DeviceError, match="GPU 1: RuntimeError: driver too old"):  # noqa: SIM117
        with usable(torch.device("cuda", 1)):
            raise RuntimeError("driver too old\nand more")
    with pytest.raises(DeviceError, match="Failed to find C compiler") as e, building_kernels():
        raise RuntimeError("Failed to find C compiler. Please specify via CC")
    assert "gcc" in (e.value.hint or "")


def test_a_gpu_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(name="H100", total_bytes=80 * GiB, used_bytes=20 * GiB, capability=(9, 0))
    monkeypatch.setattr(running, "this_gpu", lambda _: gpu)
    running.require_free(job(used_by_plan=60).plan)
    with pytest.raises(DeviceError, match=r"takes 72.0 GiB .* 60.0 GiB are free") as e:
        running.require_free(job(used_by_plan=72).plan)
    assert "--gpu-memory-utilization 0.75" in (e.value.hint or "")


def test_memory_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Any = SimpleNamespace(ranks=[SimpleNamespace(total_bytes=3 * GiB)] * 2)
    for available in (None, 6 * GiB):
        monkeypatch.setattr(running, "available_bytes", lambda found=available: found)
        running.require_available(plan)
    monkeypatch.setattr(running, "available_bytes", lambda: 6 * GiB - 1)
    with pytest.raises(DeviceError, match=r"takes 6.00 GiB .* 6.00 GiB are available") as e:
        running.require_available(plan)
    assert "--max-num-seqs" in (e.value.hint or "")


def test_what_was_chosen_is_printed() -> None:
    report: Any = SimpleNamespace(
        attention=("attention: decodes by triton", "attention: not torch: it has no sinks"),
        implementation="builtin",
        load_seconds=1.0,
        executions={},
        completions=(),
    )
    assert _summary(report).splitlines() == [
        "attention: decodes by triton",
        "attention: not torch: it has no sinks",
        "executed by builtin; ready after 1.0 s",
    ]


def test_what_was_left_at_the_tightest_moment() -> None:
    report: Any = SimpleNamespace(
        ranks=[SimpleNamespace(rank=rank, resident_bytes=size) for rank, size in ((0, 70), (1, 72))]
    )
    plan: Any = SimpleNamespace(device=SimpleNamespace(kind="cuda", total_bytes=80))
    assert _left(plan, report) == {0: 10, 1: 8}
    plan.device.kind = "cpu"
    assert _left(plan, report) == {}
