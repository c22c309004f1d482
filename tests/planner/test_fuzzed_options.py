import json
import math
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from support.configs import read_spec
from tightfit.cli.arguments import like_vllm
from tightfit.cli.ci import read_output, read_threshold
from tightfit.errors import TightfitError
from tightfit.planner.assemble import make_plan
from tightfit.planner.options import PlanOptions
from tightfit.planner.spelling import plan_options
from tightfit.planner.sweep import read_axes

NAMES = [name for name in PlanOptions.__annotations__ if name not in ("device", "engine")]
TEXT = st.one_of(
    st.text(max_size=20),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(["auto", "-1", "32k", "1G", "fp8", "1,2,4", "{}", '{"image": 1}', "true", "3"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=5,
    ).map(json.dumps),
)
VALUES = st.one_of(
    TEXT, st.none(), st.integers(), st.floats(), st.booleans(), st.lists(st.integers(), max_size=3)
)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for one in value.values() for n in numbers(one)]
    if isinstance(value, list):
        return [n for one in value for n in numbers(one)]
    return [value] if isinstance(value, int | float) else []


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), st.sampled_from(["h100", "t4"]))
def test_any_options_give_a_plan_or_an_error(given_options: dict[str, Any], gpu: str) -> None:
    try:
        options = plan_options({"gpu": gpu, "max_model_len": 4096, **given_options})
        plan = make_plan(read_spec("Llama-3.2-1B"), options, name="x")
    except TightfitError:
        return
    document = plan.to_json()
    assert all(math.isfinite(n) for n in numbers(document))
    for rank in document["ranks"]:
        assert all(component["planned_bytes"] >= 0 for component in rank["components"])
    assert document["kv_cache"]["tokens"] >= 0


@given(st.text(max_size=40))
def test_any_text_is_an_axis_or_an_error(text: str) -> None:
    for candidate in (text, f"tp={text}", f"cc={text}", f"gpu={text}"):
        try:
            axes = read_axes([candidate])
        except TightfitError:
            continue
        assert axes[0].values


@given(st.text(max_size=20))
def test_any_text_is_a_threshold_or_an_error(text: str) -> None:
    for read in (read_threshold, read_output):
        for candidate in (text, text + "%"):
            with suppress(TightfitError):
                read(candidate)


@given(st.lists(st.text(alphabet='-=._cO3{}"a', max_size=10) | st.sampled_from(["-cc.a", "--"])))
def test_any_arguments_can_be_read(words: list[str]) -> None:
    assert isinstance(like_vllm(words), list)
