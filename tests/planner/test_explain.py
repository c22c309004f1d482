import pytest

from support.configs import ONE_PER_ARCHITECTURE, read_spec
from tightfit.errors import LayoutError, UsageError
from tightfit.model.layout import Parallel
from tightfit.planner.assemble import engine, make_plan
from tightfit.planner.explain import explain, explanation_lines, weight_parts
from tightfit.planner.spelling import plan_options


def explained(model: str, name: str, **given: object) -> list[str]:
    options = plan_options(given)
    plan = make_plan(read_spec(model), options, name=model)
    chosen = engine(options)
    spec = chosen.adapt(read_spec(model), options)
    return explanation_lines(explain(plan, spec, chosen.parallel(options), name))


REFUSED = {
    "SmolLM2-360M": LayoutError,  # 15 heads
    "falcon-7b": LayoutError,  # 71 heads
}


@pytest.mark.parametrize("model", REFUSED)
def test_what_is_refused_at_two_ranks(model: str) -> None:
    with pytest.raises(REFUSED[model]):
        make_plan(read_spec(model), plan_options({"tp": 2}), name=model)


@pytest.mark.parametrize("model", [m for m in ONE_PER_ARCHITECTURE if m not in REFUSED])
def test_parts_are_all_of_the_weights(model: str) -> None:
    options = plan_options({"tp": 2})
    plan = make_plan(read_spec(model), options, name=model)
    spec = engine(options).adapt(read_spec(model), options)
    for rank in Parallel(tensor_parallel_size=2).ranks():
        parts = weight_parts(spec, rank, plan.options.dtype.value)
        weights = plan.ranks[rank.rank].component("weights")
        assert sum(part.nbytes for part in parts) == weights.planned_bytes
        assert not any(part.name == "other" for part in parts if part.nbytes > 2**28)


def test_a_model_without_rope_has_no_tables() -> None:
    found = make_plan(read_spec("mamba2-780m"), plan_options({"gpu": "h100"}), name="x")
    formula = found.ranks[0].component("weights_after_load").formula
    assert formula.startswith("no rope tables; ")


def test_a_mixture_of_experts() -> None:
    lines = explained("Qwen3-30B-A3B", "weights")
    names = [line.strip().split(" in ")[0] for line in lines[1:]]
    assert names[:2] == ["experts", "attention"]
    assert {"embedding", "head", "routers", "norms"} == set(names[2:])


def test_dtypes_are_told_apart() -> None:
    lines = explained("Qwen3-8B-FP8", "weights")
    assert any(line.startswith("  MLP in F8_E4M3: ") for line in lines)
    assert any(line.startswith("  MLP in F32: ") for line in lines)
    assert any(line.startswith("  embedding in BF16: ") for line in lines)


def test_ranks_that_differ() -> None:
    lines = explained("Llama-3.1-8B", "kv_cache", gpu="h100", pp=3)
    assert [line.partition(":")[0] for line in lines] == [
        "kv_cache on rank 0, 1",
        "kv_cache on rank 2",
    ]


def test_all() -> None:
    lines = explained("Llama-3.1-8B", "all", gpu="h100")
    names = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    assert {"weights", "kv_cache", "activations", "cuda_graphs", "non_torch"} <= set(names)


def test_no_such_component() -> None:
    with pytest.raises(UsageError) as e:
        explained("Llama-3.1-8B", "magic")
    assert e.value.message == "the plan has no component 'magic'"
    assert "weights, kv_cache" in (e.value.hint or "")


def test_what_is_quantized_while_loading() -> None:
    lines = explained("Llama-3.1-8B", "weights", gpu="h100", quantization="fp8")
    assert any(line.startswith("  MLP in F8_E4M3: 5,637,144,576 parameters") for line in lines)
