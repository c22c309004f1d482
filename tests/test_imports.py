"""What `plan` imports, which package may import which, and how long files are."""

import ast
import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.configs import DIRECTORY
from tightfit.model.families import _MODULES

SOURCE = Path(__file__).parents[1] / "src" / "tightfit"
FILES = sorted(SOURCE.rglob("*.py"))
HEAVY = ("torch", "transformers", "numpy", "pydantic", "rich", "huggingface_hub", "fsspec")
PLAN = ["plan", str(DIRECTORY / "Llama-3.1-8B.json"), "--gpu", "h100-80gb", "--json"]

# Who may import whom, besides itself.
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "units": {"errors"},
    "interrupts": set(),
    "model": {"errors", "units"},
    "checkpoint": {"errors", "units", "model"},
}
BELOW["planner"] = {"model", "checkpoint"} | BELOW["checkpoint"]
BELOW["executors"] = {"errors"}
BELOW["sharding"] = {"planner", "executors", "interrupts"} | BELOW["planner"]
BELOW["codecs"] = BELOW["checkpoint"] | {"checkpoint"}
BELOW["runtime"] = {"sharding", "codecs"} | BELOW["sharding"]
BELOW["serve"] = {"runtime"} | BELOW["runtime"]
BELOW["demo"] = {"runtime"} | BELOW["runtime"]
BELOW["quantize"] = {"demo"} | BELOW["demo"]
BELOW["cli"] = {"quantize", "serve"} | BELOW["quantize"]
BELOW["__init__"] = {"planner"}
BELOW["__main__"] = {"cli"}


def imports(path: Path) -> Iterator[str]:
    """The parts of tightfit that a file imports, inside functions as well."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [node.module or ""]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "tightfit" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_dependencies_run_one_way(path: Path) -> None:
    package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert set(imports(path)) <= BELOW[package] | {package}


def test_no_file_is_long() -> None:
    lengths = {p.name: len(p.read_text("utf-8").splitlines()) for p in FILES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_plan_imports_nothing_heavy() -> None:
    code = (
        "import atexit, json, sys; from tightfit.cli.main import main; "
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr)); "
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *PLAN], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["verdict"]["fits"] is True
    modules = {name.split(".")[0] for name in json.loads(done.stderr)}
    assert modules & set(HEAVY) == set()
    assert "tightfit" in modules


def test_plan_is_quick() -> None:
    """CPU seconds of the whole process, interpreter included; neighbours only ever add to them."""
    seconds = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "tightfit", *PLAN], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.35


def test_families_and_their_table_agree() -> None:
    families = SOURCE / "model" / "families"
    found = {}
    for path in families.glob("*.py"):
        if path.stem in ("__init__", "decoder"):
            continue
        module = importlib.import_module(f"tightfit.model.families.{path.stem}")
        if not hasattr(module, "ARCHITECTURES"):
            continue  # What several families share.
        found |= dict.fromkeys(module.ARCHITECTURES, path.stem)
        assert callable(module.spec)
    assert found == dict(_MODULES)
