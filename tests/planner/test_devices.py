from pathlib import Path

import pytest

from tightfit.errors import UsageError
from tightfit.planner.devices import CATALOGUE, device, this_machine
from tightfit.units import GiB


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100-80GB", "h100-80gb"),
        ("h100", "h100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("H100 NVL", "h100-nvl-94gb"),
        ("h200", "h200-141gb"),
        ("b2", "b200-180gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("RTX 4090", "rtx4090-24gb"),
        ("4090", "rtx4090-24gb"),
        ("NVIDIA GeForce RTX 4080", "rtx4080-16gb"),
        ("a6000", "rtxa6000-48gb"),
        ("L4", "l4-24gb"),
        ("L40S", "l40s-48gb"),
        ("l40", "l40-48gb"),
        ("AMD Instinct MI300X", "mi300x-192gb"),
    ],
)
def test_by_name(text: str, name: str) -> None:
    assert device(text, None) is CATALOGUE[name]


def test_no_device() -> None:
    assert device(None, None) is None


def test_a_driver_reports_less_than_the_brochure() -> None:
    for name, entry in CATALOGUE.items():
        brochure = int(name.rsplit("-", 1)[1].removesuffix("gb"))
        assert 0.88 * brochure < entry.total_bytes / GiB < brochure


def test_measured_totals() -> None:
    assert CATALOGUE["h100-80gb"].total_bytes == int(79.18 * GiB)
    assert CATALOGUE["h200-141gb"].total_bytes == int(139.80 * GiB)
    assert CATALOGUE["h100-80gb"].logged
    assert not CATALOGUE["b300-288gb"].logged


def test_before_bfloat16() -> None:
    assert {name for name, one in CATALOGUE.items() if not one.bfloat16} == {
        "rtx2080ti-11gb",
        "t4-16gb",
        "v100-16gb",
        "v100-32gb",
    }


def test_every_nvidia_device_has_a_capability() -> None:
    for one in CATALOGUE.values():
        assert (one.capability is not None) == (one.kind == "cuda"), one.name
    assert CATALOGUE["h100-nvl-94gb"].capability == (9, 0)


def test_by_size() -> None:
    found = device(None, "24GiB")
    assert found is not None
    assert found.total_bytes == 24 * GiB
    assert found.name == "a GPU of 24.0 GiB"


@pytest.mark.parametrize(
    ("gpu", "memory", "message", "hint"),
    [
        ("a100", None, "--gpu 'a100' could be several GPUs", "one of a100-40gb, a100-80gb"),
        ("rtx", None, "--gpu 'rtx' could be several GPUs", "one of rtx3080-10gb, "),
        ("x", None, "unknown GPU 'x'", "known: rtx3080-10gb, "),
        ("", None, "unknown GPU ''", "known: "),
        ("h1000", None, "unknown GPU 'h1000'", "did you mean h100-"),
        ("rtx4091", None, "unknown GPU 'rtx4091'", "did you mean rtx4090-24gb"),
        ("h100-80gb", "80GiB", "--gpu and --gpu-memory contradict each other", "give one"),
        (None, "24", "--gpu-memory 24 is less than any GPU has", "write it"),
        (None, "much", "'much' is not a size", "write it"),
    ],
)
def test_wrong(gpu: str | None, memory: str | None, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as e:
        device(gpu, memory)
    assert e.value.message == message
    assert (e.value.hint or "").startswith(hint)


def test_this_machine() -> None:
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    assert 0 < this_machine().total_bytes <= total
    assert this_machine().kind == "cpu"
