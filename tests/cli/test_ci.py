import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from support.cli import assert_error, tightfit
from support.configs import DIRECTORY
from tightfit.cli.ci import Finding, github, junit, read_output, read_threshold
from tightfit.errors import UsageError

LLAMA = DIRECTORY / "Llama-3.1-8B.json"
FITS = ("plan", LLAMA, "--gpu", "h100", "--max-model-len", "32k")


@pytest.mark.parametrize(
    ("threshold", "code"), [("5%", 0), ("75%", 1), ("2GiB", 0), ("60GiB", 1), ("0%", 0)]
)
def test_headroom_decides(threshold: str, code: int) -> None:
    done = tightfit(*FITS, "--fail-under-headroom", threshold)
    assert done.returncode == code
    word = "fails" if code else "passes"
    text = " ".join(done.stdout.split())
    assert f"{word}: headroom of at least {threshold}: 5" in text
    assert "beyond one sequence of 32,000 tokens" in text


def test_headroom_as_data() -> None:
    done = tightfit(*FITS, "--fail-under-headroom", "75%", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 1
    assert document["verdict"]["fits"] is True
    assert [one["failed"] for one in document["findings"]] == [False, True]


def test_what_does_not_fit_fails_every_threshold() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "t4", "--fail-under-headroom", "0%", "--json")
    assert done.returncode == 1
    assert [one["failed"] for one in json.loads(done.stdout)["findings"]] == [True, True]


def test_junit(tmp_path: Path) -> None:
    done = tightfit(*FITS, "--fail-under-headroom", "75%", "--output", "junit")
    assert done.returncode == 1
    suites = ET.fromstring(done.stdout)
    assert suites.attrib["tests"] == "2"
    assert suites.attrib["failures"] == "1"
    good, bad = suites.iter("testcase")
    assert (good.attrib["classname"], good.attrib["name"]) == ("Llama-3.1-8B", "fits")
    assert bad.find("failure") is not None
    file = tmp_path / "plan.xml"
    done = tightfit(*FITS, "--output", f"junit:{file}")
    assert (done.returncode, done.stdout) == (0, "")
    assert ET.parse(file).getroot().attrib["failures"] == "0"
    done = tightfit(*FITS, "--output", f"junit:{tmp_path / 'no' / 'plan.xml'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write ")


def test_a_case_per_point_of_a_sweep() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "h100", "--sweep", "tp=1,3", "--output", "junit")
    assert done.returncode == 0
    suites = ET.fromstring(done.stdout)
    assert [case.attrib["classname"] for case in suites.iter("testcase")] == [
        "Llama-3.1-8B tensor_parallel_size=1",
        "Llama-3.1-8B tensor_parallel_size=3",
    ]
    assert suites.attrib["failures"] == "1"


def test_github() -> None:
    done = tightfit("plan", LLAMA, "--gpu", "t4", "--output", "github")
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith("::error title=tightfit plan%3A fits::Llama-3.1-8B: a rank holds ")
    assert tightfit(*FITS, "--output", "github").stdout.startswith("::notice ")


def test_names_cannot_forge_anything() -> None:
    evil = "x\n::error::y\x1b[31m%0A]]></failure>\0"
    found = [Finding(subject=evil, check="fits", detail=evil, failed=True)]
    assert github(found).count("\n") == 1
    assert "\x1b" not in github(found)
    case = next(ET.fromstring(junit(found)).iter("testcase"))
    assert case.attrib["classname"].startswith("x\\n::error::y\\x1b[31m")


@pytest.mark.parametrize("text", ["x%", "-1%", "100%", "nan%", "lots"])
def test_wrong_thresholds(text: str) -> None:
    with pytest.raises(UsageError):
        read_threshold(text)


@pytest.mark.parametrize("text", ["xml", "junit:", "", "JSON"])
def test_wrong_outputs(text: str) -> None:
    with pytest.raises(UsageError):
        read_output(text)


def test_no_device_to_compare_with() -> None:
    done = tightfit("plan", LLAMA, "--fail-under-headroom", "5%")
    assert_error(done, 2, "--fail-under-headroom needs a device")


@pytest.mark.parametrize("output", [[], ["--json"], ["--output", "junit"]])
@pytest.mark.parametrize(("gpu", "code"), [("t4", 1), ("h100", 0)])
def test_the_verdict_outlives_its_reader(gpu: str, code: int, output: list[str]) -> None:
    command = [sys.executable, "-m", "tightfit", "plan", os.fspath(LLAMA), "--gpu", gpu, *output]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == code
    assert done.stderr == b""
