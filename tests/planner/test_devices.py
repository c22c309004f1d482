from pathlib import Path

import pytest

from tightfit.errors import UsageError
from tightfit.planner.devices import CATALOGUE, device, this_machine
from tightfit.units import GiB


def test_by_name() -> None:
    assert device("H100-80GB", None) is CATALOGUE["h100-80gb"]
    assert device(None, None) is None


def test_a_driver_reports_less_than_the_brochure() -> None:
    for name, entry in CATALOGUE.items():
        brochure = int(name.rsplit("-", 1)[1].removesuffix("gb"))
        assert 0.88 * brochure < entry.total_bytes / GiB < brochure


def test_by_size() -> None:
    found = device(None, "24GiB")
    assert found is not None
    assert found.total_bytes == 24 * GiB


@pytest.mark.parametrize(
    ("gpu", "memory", "message"),
    [
        ("h100", None, "unknown GPU 'h100'"),
        ("h100-80gb", "80GiB", "--gpu and --gpu-memory contradict each other"),
        (None, "24", "--gpu-memory 24 is less than any GPU has"),
        (None, "much", "'much' is not a size"),
    ],
)
def test_wrong(gpu: str | None, memory: str | None, message: str) -> None:
    with pytest.raises(UsageError) as e:
        device(gpu, memory)
    assert e.value.message == message
    assert e.value.hint


def test_this_machine() -> None:
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    assert 0 < this_machine().total_bytes <= total
    assert this_machine().kind == "cpu"
