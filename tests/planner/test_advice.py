from dataclasses import replace
from typing import Any

import pytest

from support.configs import MODELS, read_spec
from tightfit.errors import UnsupportedModelError, UsageError
from tightfit.planner.advice import advise
from tightfit.planner.assemble import make_plan
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Advice, Component, Plan
from tightfit.planner.spelling import plan_options
from tightfit.units import GiB


def advice_for(model: str, **given: object) -> tuple[Plan, dict[str, Advice]]:
    options = plan_options(given)

    def replan(changed: PlanOptions) -> Plan:
        return make_plan(read_spec(model), changed, name=model)

    plan = replan(options)
    found = advise(plan, options, replan)
    assert list(found) == sorted(found, key=lambda one: _rank(plan, one))
    return plan, {one.change: one for one in found}


def _rank(plan: Plan, one: Advice) -> tuple[bool, bool, int]:
    """What cures comes first, what only helps the host last."""
    host = one.costs.startswith("saves memory of the host")
    return host, not host and plan.verdict.fits is False and not one.fits, -one.saves_bytes


def by_flag(found: dict[str, Advice], flag: str) -> Advice:
    return next(one for change, one in found.items() if change.startswith(flag))


def test_what_makes_it_fit_comes_first() -> None:
    plan, found = advice_for("Llama-3.1-8B", gpu="rtx4090")
    assert plan.verdict.fits is False
    first = next(iter(found.values()))
    assert first.fits is True
    assert found["--tensor-parallel-size 2"].fits is True
    assert found["--pipeline-parallel-size 2"].fits is True
    assert by_flag(found, "--max-model-len").fits is True
    assert by_flag(found, "--gpu ").fits is True
    eager = found["--enforce-eager"]
    assert eager.fits is False
    assert all(one.costs and one.saves_bytes > 0 for one in found.values())


@pytest.mark.parametrize(
    "changed",
    [
        {"tensor_parallel_size": 2},
        {"kv_cache_dtype": "fp8"},
        {"enforce_eager": True},
        {"gpu_memory_utilization": 0.95},
    ],
)
def test_savings_are_those_of_the_plan_with_the_change(changed: dict[str, Any]) -> None:
    before, found = advice_for("Qwen3-8B", gpu="l40s")
    flag = next(iter(changed)).replace("_", "-")
    value = "" if changed == {"enforce_eager": True} else f" {next(iter(changed.values()))}"
    after, _ = advice_for("Qwen3-8B", gpu="l40s", **changed)

    def lacking(plan: Plan) -> int:
        assert plan.kv_cache.available_bytes is not None
        return plan.kv_cache.reserved_bytes - plan.kv_cache.available_bytes

    assert found[f"--{flag}{value}"].saves_bytes == lacking(before) - lacking(after)


def test_following_the_advice_makes_it_fit() -> None:
    _, found = advice_for("Llama-3.1-8B", gpu="rtx4090")
    longest = by_flag(found, "--max-model-len").change.split()[1]
    plan, _ = advice_for("Llama-3.1-8B", gpu="rtx4090", max_model_len=longest)
    assert plan.verdict.fits is True
    gpu = by_flag(found, "--gpu ").change.split()[1]
    plan, _ = advice_for("Llama-3.1-8B", gpu=gpu)
    assert plan.verdict.fits is True


def test_a_pool_that_is_too_large() -> None:
    _, found = advice_for(
        "Llama-3.1-8B", gpu="h100", max_model_len=8192, kv_cache_memory_bytes="63GiB"
    )
    assert found["no --kv-cache-memory-bytes"].fits is True
    assert by_flag(found, "--kv-cache-memory-bytes").fits is True


def test_a_fitted_length_is_kept() -> None:
    plan, found = advice_for("Llama-3.1-8B", gpu="rtx4090", max_model_len="auto")
    assert plan.verdict.fits is True
    assert found["--tensor-parallel-size 2"].saves_bytes > 8 * GiB


def test_without_a_device() -> None:
    plan, found = advice_for("Llama-3.1-8B")
    assert plan.verdict.fits is None
    assert found["--tensor-parallel-size 2"].saves_bytes > 8 * GiB
    assert not any(change.startswith("--gpu ") for change in found)


def test_other_engines() -> None:
    plan, found = advice_for("SmolLM2-135M", engine="builtin", gpu_memory="1GiB", dtype="float32")
    assert plan.options.dtype.value == "F32"
    assert "--dtype bfloat16" in found
    assert "--pipeline-parallel-size 2" not in found


def test_a_remedy_that_fails_is_left_out() -> None:
    options = plan_options({"gpu": "rtx4090"})

    def replan(changed: PlanOptions) -> Plan:
        if changed.tensor_parallel_size > 1:
            raise UsageError("no such layout")
        if changed.enforce_eager:
            raise UnsupportedModelError("no such mode")
        return make_plan(read_spec("Llama-3.1-8B"), changed, name="x")

    found = {one.change for one in advise(replan(options), options, replan)}
    assert "--kv-cache-dtype fp8" in found
    assert not any("tensor-parallel" in one or "eager" in one for one in found)


def test_our_own_bugs_are_not_taken_for_refusals() -> None:
    options = plan_options({"gpu": "rtx4090"})
    plan = make_plan(read_spec("Llama-3.1-8B"), options, name="x")

    def replan(changed: PlanOptions) -> Plan:
        raise KeyError(changed.engine)

    with pytest.raises(KeyError):
        advise(plan, options, replan)


@pytest.mark.parametrize("model", MODELS[::7])
def test_every_model_gets_advice(model: str) -> None:
    _, found = advice_for(model, gpu_memory="8GiB")
    assert found


def test_an_encoder_and_the_host() -> None:
    """Until an engine has them: a plan with both, and what helps them."""
    encoder = Component(name="vision_encoder", planned_bytes=GiB, origin="derived", formula="x")
    cache = Component(name="mm_processor_cache", planned_bytes=4 * GiB, origin="exact", formula="x")

    def replan(options: PlanOptions) -> Plan:
        plan = make_plan(read_spec("Llama-3.1-8B"), options, name="x")
        limit = options.limit_mm_per_prompt.get("video", 1) == 0
        share = 0 if options.language_model_only else 2 if limit else 1
        rank = plan.ranks[0]
        part = replace(encoder, planned_bytes=share and GiB // share)
        rank = replace(rank, components=(*rank.components, part))
        held = options.mm_processor_cache_gb != 0
        return replace(plan, ranks=(rank,), host=(cache,) if held else ())

    options = plan_options({"gpu": "h100"})
    found = {one.change: one for one in advise(replan(options), options, replan)}
    assert found["--language-model-only"].saves_bytes == GiB
    limit = """--limit-mm-per-prompt '{"image": 1, "video": 0}'"""
    assert found[limit].saves_bytes == GiB // 2
    assert list(found)[-1] == "--mm-processor-cache-gb 0"
    assert found["--mm-processor-cache-gb 0"].saves_bytes == 4 * GiB


def test_nothing_is_proposed_that_is_alone_in_its_machine() -> None:
    _, found = advice_for("DeepSeek-V3", gpu="h100", tp="8")
    assert "--gpu h200-141gb" in found
    assert "--gpu gb10-128gb" not in found


def test_an_encoder_decoder_keeps_its_encoder() -> None:
    plan, found = advice_for("whisper-large-v3", gpu_memory="8GiB")
    assert plan.model.is_encoder_decoder
    assert not [change for change in found if "language-model" in change or "-mm-per-" in change]
