"""The user's own measurements: kept, found again, and never trusted blindly."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.configs import read_spec
from tightfit.errors import ConfigError, OutputError
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import CATALOGUE
from tightfit.planner.options import PlanOptions
from tightfit.planner.user_calibration import (
    Record,
    add_record,
    adjustments,
    calibration_path,
    find_record,
    read_records,
    record_of,
)
from tightfit.planner.vllm_log import compare, read_log
from tightfit.units import MiB

RECORD = Record(
    engine="vllm",
    version="0.25.1",
    device="h100-80gb",
    architecture="LlamaForCausalLM",
    tensor_parallel_size=2,
    adjustments={"non_torch": 3 * MiB, "activations": -MiB},
    source="vllm.log",
)


def test_records_are_found_again_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert adjustments(*RECORD.key) == {}
    path = add_record(RECORD)
    assert path == calibration_path() == tmp_path / "tightfit" / "calibration.json"
    add_record(replace(RECORD, tensor_parallel_size=4, adjustments={"cuda_graphs": 7}))
    assert find_record(*RECORD.key) == RECORD
    newer = replace(RECORD, adjustments={"non_torch": 5})
    add_record(newer)
    assert adjustments(*RECORD.key) == {"non_torch": 5}
    assert len(read_records(path)) == 2
    assert find_record("vllm", "0.25.1", "h200-141gb", "LlamaForCausalLM", 2) is None
    assert [one.name for one in path.parent.iterdir()] == ["calibration.json"]


def test_a_relative_directory_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "somewhere")
    assert calibration_path() == Path.home() / ".config" / "tightfit" / "calibration.json"


def test_a_log_teaches_what_the_plan_missed() -> None:
    log = read_log(Path(__file__).parents[1] / "data" / "logs" / "v0.25.1.log")
    options = PlanOptions(**{**log.options, "device": CATALOGUE["h100-80gb"]})
    plan = make_plan(read_spec("Llama-3.1-8B"), options, name="llama")
    lines = compare(plan, log)
    record = record_of(plan, lines, source="v0.25.1.log")
    assert record is not None
    assert record.key == ("vllm", "0.25.1", "h100-80gb", "LlamaForCausalLM", 1)
    planned = {line.name: line.planned for line in lines}
    logged = {line.name: line.logged for line in lines}
    difference = (logged["non_torch"] or 0) - (planned["non_torch"] or 0)
    assert record.adjustments["non_torch"] == difference
    assert record_of(plan, []) is None


GOOD: dict[str, Any] = {
    "schema": 1,
    "records": [
        {"engine": "vllm", "version": "1", "device": "d", "architecture": "a"}
        | {"tensor_parallel_size": 1, "adjustments": {"non_torch": 1}}
    ],
}


def changed(**entry: Any) -> str:
    return json.dumps({**GOOD, "records": [GOOD["records"][0] | entry]})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "Expecting"),
        ("[]", "list"),
        ("[" * 100_000, "recursion"),
        ('{"schema": 2, "records": []}', "schema 2"),
        ('{"schema": 1}', "no 'records'"),
        (changed(device=7), "device is 7"),
        (changed(tensor_parallel_size=True), "tensor_parallel_size is True"),
        (changed(adjustments={"weights": 1}), "'weights' cannot be adjusted"),
        (changed(adjustments={"non_torch": 1.5}), "non_torch is 1.5"),
        (changed(adjustments={"non_torch": 2**60}), "non_torch is"),
        (changed(adjustments=[]), "no calibration file"),
        ("x" * (2**20 + 1), "larger"),
    ],
)
def test_a_broken_file_is_told_and_left_alone(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match) as caught:
        find_record(*RECORD.key, path=path)
    assert "remove it" in (caught.value.hint or "")
    with pytest.raises(ConfigError):
        add_record(RECORD, path)
    assert path.read_text() == text


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        add_record(RECORD, tmp_path / "file" / "calibration.json")
