"""Plans for the built-in runtime: formulas that `run` proves elsewhere, their shape here."""

from dataclasses import replace

import pytest

from support.configs import read_spec
from tightfit.errors import UsageError
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import CATALOGUE, Device
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.units import GiB

CPU = Device(name="cpu", total_bytes=16 * GiB, kind="cpu")


def plan(name: str = "SmolLM2-135M", **options: object) -> Plan:
    asked = {"engine": "builtin", "device": CPU, **options}
    return make_plan(read_spec(name), PlanOptions(**asked), name=name)  # type: ignore[arg-type]


def test_components() -> None:
    on_cpu = plan().ranks[0]
    assert [c.name for c in on_cpu.components] == [
        "weights",
        "kv_cache",
        "persistent_buffers",
        "activations",
        "logits_and_sampler",
        "process_baseline",
    ]
    assert on_cpu.component("process_baseline").origin == "calibrated"
    on_gpu = plan(device=CATALOGUE["l4-24gb"]).ranks[0]
    assert "process_baseline" not in {c.name for c in on_gpu.components}


def test_ranks_of_a_cpu_share_its_memory_unevenly() -> None:
    result = plan(tensor_parallel_size=2)
    first, second = result.ranks
    assert first.budget_bytes == second.budget_bytes == -(-16 * GiB * 9 // 10) // 2
    # Nine query heads in groups of three: one group on the first rank, two on the second.
    assert first.component("weights").planned_bytes < second.component("weights").planned_bytes
    kv = [rank.component("kv_cache").planned_bytes for rank in result.ranks]
    assert kv[1] == 2 * kv[0]


def test_a_cpu_pool_is_no_larger_than_useful() -> None:
    result = plan(max_model_len=1024, max_num_seqs=4)
    assert result.kv_cache.num_blocks == 4 * 1024 // 16
    assert result.kv_cache.max_concurrency == 4
    given = plan(max_model_len=1024, max_num_seqs=4, kv_cache_memory_bytes=GiB)
    assert given.kv_cache.num_blocks == GiB // (16 * 30 * 2 * 3 * 64 * 2)


def test_windows_save_nothing_here() -> None:
    kv = plan("gemma-3-1b-it", max_model_len=4096).kv_cache
    assert kv.reserved_bytes == kv.all_full_bytes == 4096 * kv.bytes_per_token


@pytest.mark.parametrize("option", ["max_model_len", "max_num_seqs", "max_num_batched_tokens"])
def test_more_asked_is_more_planned(option: str) -> None:
    base = {"max_model_len": 1024, "max_num_seqs": 8, "max_num_batched_tokens": 256}
    for name in ("SmolLM2-135M", "gemma-2-2b-it", "Qwen3-30B-A3B"):
        small = plan(name, **base, kv_cache_memory_bytes=GiB).ranks[0]
        large = plan(name, **(base | {option: 4 * base[option]}), kv_cache_memory_bytes=GiB)
        assert large.ranks[0].total_bytes > small.total_bytes


def test_refusals() -> None:
    with pytest.raises(UsageError) as e:
        plan(pipeline_parallel_size=2)
    assert e.value.message == (
        "--pipeline-parallel-size 2: the builtin runtime has tensor parallelism only"
    )
    with pytest.raises(UsageError) as e:
        plan(kv_cache_dtype="fp8")
    assert e.value.message.startswith("--kv-cache-dtype fp8: the builtin runtime stores keys and ")


def test_does_not_fit() -> None:
    verdict = plan(device=replace(CPU, total_bytes=GiB // 2)).verdict
    assert verdict.fits is False
    assert verdict.engine_message
    assert verdict.max_model_len_that_fits == 0


def test_the_longest_context_pays_for_its_own_buffers() -> None:
    """A plan for 4,096 tokens leaves room that the masks of a longer context need themselves."""
    device = replace(CPU, total_bytes=2_314_063_359)
    longest = plan("Qwen3-0.6B", device=device).verdict.max_model_len_that_fits
    assert longest is not None
    assert plan("Qwen3-0.6B", device=device, max_model_len=longest).verdict.fits
    assert plan("Qwen3-0.6B", device=device, max_model_len=longest + 1).verdict.fits is False
    fitted = plan("Qwen3-0.6B", device=device, max_model_len=-1)
    assert fitted.options.max_model_len.value == longest
    assert fitted.options.max_model_len.origin == "fitted"
    again = plan("Qwen3-0.6B", device=device, max_model_len=longest)
    assert fitted.ranks == again.ranks
