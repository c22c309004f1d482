import pytest

from support.configs import read_spec
from tightfit.errors import LayoutError, UsageError
from tightfit.planner.assemble import make_plan
from tightfit.planner.fit import Fitted, fit
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.planner.spelling import plan_options


def replan_of(model: str, calls: list[PlanOptions] | None = None):  # type: ignore[no-untyped-def]
    def replan(options: PlanOptions) -> Plan:
        if calls is not None:
            calls.append(options)
        return make_plan(read_spec(model), options, name=model)

    return replan


def fitted(model: str, **given: object) -> Fitted:
    return fit(plan_options(given), replan_of(model))


def test_the_longest_context() -> None:
    found = fitted("Llama-3.1-8B", gpu="rtx4090")
    assert found.what == "max_model_len"
    assert found.plan.verdict.fits is True
    assert isinstance(found.value, int)
    replan = replan_of("Llama-3.1-8B")
    for length, fits in ((found.value, True), (found.value + 16, False)):
        plan = replan(plan_options({"gpu": "rtx4090", "max_model_len": length}))
        assert plan.verdict.fits is fits


def test_the_most_sequences() -> None:
    found = fitted("Llama-3.1-8B", gpu="rtx4090", max_model_len=8192)
    assert found.what == "max_num_seqs"
    assert isinstance(found.value, int)
    assert found.plan.options.max_num_seqs.value == found.value
    assert (found.plan.kv_cache.max_concurrency or 0) >= found.value
    more = {"gpu": "rtx4090", "max_model_len": 8192, "max_num_seqs": found.value + 1}
    plan = replan_of("Llama-3.1-8B")(plan_options(more))
    assert (plan.kv_cache.max_concurrency or 0) < found.value + 1
    assert f"--max-num-seqs {found.value}" in found.sentence


def test_the_smallest_devices() -> None:
    found = fitted("Qwen3-32B", max_model_len=32768)
    assert found.what == "gpu"
    best, *others = found.candidates
    assert found.value == best.device.name
    assert found.plan is best.plan
    assert found.plan.verdict.fits is True
    assert found.options.device is best.device
    assert found.options.tensor_parallel_size == best.count
    assert all(one.total_bytes >= best.total_bytes for one in others)
    kinds = [one.device.name for one in found.candidates]
    assert len(kinds) == len(set(kinds))
    assert {"h100-80gb", "mi300x-192gb"} < set(kinds)
    assert not any(name.startswith(("t4", "v100", "rtx2080")) for name in kinds)
    h100 = next(one for one in found.candidates if one.device.name == "h100-80gb")
    fewer = {"gpu": "h100", "tp": h100.count // 2, "max_model_len": 32768}
    if h100.count > 1:
        plan = replan_of("Qwen3-32B")(plan_options(fewer))
        assert plan.verdict.fits is False


def test_devices_that_cannot_hold_the_weights_are_not_planned() -> None:
    calls: list[PlanOptions] = []
    fit(plan_options({}), replan_of("Llama-3.1-70B", calls))
    assert not any(call.device and call.device.total_bytes * 8 < 140e9 for call in calls)


def test_a_given_layout_is_kept() -> None:
    found = fit(plan_options({"tp": 2}), replan_of("Llama-3.1-8B"), sizes=(2,))
    assert {one.count for one in found.candidates} == {2}


def test_nothing_fits() -> None:
    for given in ({"gpu_memory": "8GiB"}, {"gpu_memory": "8GiB", "max_model_len": 8192}):
        found = fitted("Llama-3.1-8B", **given)
        assert found.value is None
        assert found.plan.verdict.fits is False
    found = fit(plan_options({}), replan_of("Llama-3.1-405B"), sizes=(1,))
    assert found.value is None
    assert found.plan.verdict.fits is False


def test_wrong() -> None:
    with pytest.raises(UsageError, match="nothing to find"):
        fitted("Llama-3.1-8B", gpu="h100", max_model_len=8192, max_num_seqs=4)
    with pytest.raises(LayoutError):
        fit(plan_options({"pp": 99}), replan_of("Llama-3.1-8B"))
