from dataclasses import replace

from support.configs import read_config
from tightfit.model.families import model_spec
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import Device
from tightfit.planner.engines.builtin_memory import OTHER_VERSION
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.runtime.checks import compare, with_measured
from tightfit.units import GiB, MiB

MACHINE = Device(name="cpu", total_bytes=16 * GiB, kind="cpu")


def plan(*, known: bool) -> Plan:
    options = PlanOptions(engine="builtin", device=MACHINE, max_model_len=512)
    made = make_plan(model_spec(read_config("SmolLM2-135M")), options, name="model")
    (rank,) = made.ranks
    components = tuple(
        replace(c, detail={} if known else {OTHER_VERSION: 1}) if c.origin == "calibrated" else c
        for c in rank.components
    )
    return replace(made, ranks=(replace(rank, components=components),))


def judge(made: Plan, **more: int) -> dict[str, bool]:
    """What is ok if the components take so many bytes more than planned."""
    planned = {c.name: c.planned_bytes for c in made.ranks[0].components}
    measured = {name: planned[name] + more.get(name, 0) for name in planned}
    checks = compare(with_measured(made, {0: measured}), {0: sum(measured.values())}, 0.1)
    return {check.component: check.ok for check in checks}


def test_as_planned() -> None:
    assert all(judge(plan(known=True)).values())


def test_weights_are_known_to_the_byte_and_others_are_not() -> None:
    weights = plan(known=True).ranks[0].component("weights").planned_bytes
    found = judge(plan(known=True), weights=weights // 50, activations=8 * MiB)
    assert not found["weights"]
    assert found["activations"]


def test_a_baseline_twice_as_large_is_blamed_only_where_it_was_measured() -> None:
    twice = plan(known=True).ranks[0].component("process_baseline").planned_bytes
    known = judge(plan(known=True), process_baseline=twice)
    assert not known["process_baseline"]
    assert not known["total"]
    assert all(judge(plan(known=False), process_baseline=twice).values())


def test_an_unknown_baseline_hides_no_other_difference() -> None:
    found = judge(plan(known=False), process_baseline=600 * MiB, kv_cache=300 * MiB)
    assert not found["kv_cache"]
    assert not found["total"]
