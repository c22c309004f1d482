import json
from pathlib import Path
from typing import Any

import pytest

from support.configs import read_spec
from tightfit.errors import UsageError
from tightfit.planner.assemble import make_plan
from tightfit.planner.diff import Change, diff, read_plan
from tightfit.planner.spelling import plan_options


def document(**given: object) -> dict[str, Any]:
    text = json.dumps(make_plan(read_spec("Llama-3.1-8B"), plan_options(given), name="x").to_json())
    found: dict[str, Any] = json.loads(text)
    return found


def by_name(changes: tuple[Change, ...]) -> dict[str, Change]:
    return {change.name: change for change in changes}


def test_a_plan_and_itself() -> None:
    one = document(gpu="h100", tp=2)
    difference = diff(one, one)
    assert difference.facts == ()
    (group,) = difference.ranks
    assert group.ranks == (0, 1)
    for change in (*group.changes, *difference.kv_cache, *difference.verdict):
        assert change.difference in (0, None)


def test_what_changed() -> None:
    old = document(gpu="h100", max_model_len=8192)
    new = document(gpu="h100", max_model_len=8192, kv_cache_dtype="fp8", enforce_eager=True)
    difference = diff(old, new)
    facts = by_name(difference.facts)
    assert facts["kv_cache_dtype"] == Change(name="kv_cache_dtype", old="BF16", new="F8_E4M3")
    assert "max_model_len" not in facts
    kv = by_name(difference.kv_cache)
    assert kv["bytes_per_token"].difference == -65536
    (group,) = difference.ranks
    graphs = by_name(group.changes)["cuda_graphs"]
    assert graphs.new is None
    assert graphs.difference == -graphs.old
    names = [change.name for change in group.changes]
    assert names.index("weights") < names.index("kv_cache") < names.index("cuda_graphs")
    assert json.loads(json.dumps(difference.to_json()))["diff"]["ranks"][0]["ranks"] == [0]


def test_other_numbers_of_ranks() -> None:
    difference = diff(document(gpu="h100"), document(gpu="h100", tp=2))
    assert by_name(difference.facts)["ranks"].difference == 1
    assert difference.ranks[0].ranks == (0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{} is not JSON"),
        ("[" * 100_000, "{} is not JSON"),
        ("[]", "{} is not a plan"),
        ('{"schema": 1}', "{} is not a plan"),
        ('{"schema": 2, "ranks": [], "kv_cache": {}}', "{} has the schema 2, not 1"),
    ],
)
def test_no_plan(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UsageError) as e:
        read_plan(path)
    assert e.value.message == message.format(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("key", ["ranks", "options", "engine", "verdict", "kv_cache", "model"])
@pytest.mark.parametrize("value", [None, 1, "x", [1]])
def test_damaged_plans(key: str, value: object) -> None:
    good = document(gpu="h100")
    with pytest.raises(UsageError, match="a plan lacks what plans have"):
        diff(good, good | {key: value})
