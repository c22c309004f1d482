"""Plans for the built-in runtime: formulas that `run` proves elsewhere, their shape here."""

from dataclasses import replace

import pytest

from support.configs import read_spec
from tightfit.errors import UsageError
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import CATALOGUE, Device
from tightfit.planner.engines.builtin_quantized import CUDA_SPLIT_ELEMENTS
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Component, Plan, RankPlan
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


def test_a_stage_holds_its_own() -> None:
    def components(rank: RankPlan) -> dict[str, int]:
        return {one.name: one.planned_bytes for one in rank.components}

    for name in ("SmolLM2-135M", "Llama-3.1-8B"):
        large = replace(CPU, total_bytes=512 * GiB)
        (alone,) = plan(name, device=large).ranks
        first, last = plan(name, device=large, pipeline_parallel_size=2).ranks
        whole, one, two = components(alone), components(first), components(last)
        # Tied embeddings are at both ends.
        ends = 2 * 49152 * 576 if name == "SmolLM2-135M" else 0
        assert one["weights"] + two["weights"] == whole["weights"] + ends
        assert one["kv_cache"] + two["kv_cache"] == whole["kv_cache"]
        assert one["logits_and_sampler"] == 0
        assert two["logits_and_sampler"] == whole["logits_and_sampler"]
        assert one["activations"] == two["activations"] == whole["activations"]


def test_rows_that_ranks_give_each_other_count() -> None:
    def needed(size: int) -> int:
        found = plan(
            "Llama-3.1-8B",
            device=CATALOGUE["h100-80gb"],
            tensor_parallel_size=size,
            max_num_seqs=256,
            max_num_batched_tokens=256,
        )
        by_name = {component.name: component for component in found.ranks[0].components}
        return int(by_name["logits_and_sampler"].detail["alone_bytes"])

    vocab, hidden, rows = 128_256, 4096, 256
    # The residual stream, the rows to predict from, and those after the norm or gathered ones.
    assert needed(1) == 2 * rows * (hidden + 2 * hidden + vocab)
    share = vocab // 2
    gathered = share + 2 * share + vocab
    assert needed(2) == 2 * rows * (hidden + hidden + share + gathered)


def test_a_cache_of_fp8() -> None:
    for device in (CPU, CATALOGUE["l4-24gb"]):
        wide, narrow = (plan(device=device, kv_cache_dtype=word) for word in ("bfloat16", "fp8"))
        assert wide.kv_cache == plan(device=device).kv_cache
        assert narrow.kv_cache.dtype == "F8_E4M3"
        assert 2 * narrow.kv_cache.bytes_per_block == wide.kv_cache.bytes_per_block
        assert narrow.options.kv_cache_dtype.origin == "flag"
    # On a CPU pieces are converted; on a GPU kernels do it in registers.
    assert (
        "a piece of the fp8 cache: "
        in plan(kv_cache_dtype="fp8").ranks[0].component("activations").formula
    )
    assert narrow.ranks[0].component("activations") == wide.ranks[0].component("activations")


def test_a_checkpoint_that_asks_for_fp8_gets_it() -> None:
    spec = replace(read_spec("SmolLM2-135M"), kv_cache_quantization="fp8")

    def dtype(**asked: str) -> tuple[str, str]:
        options = PlanOptions(engine="builtin", device=CPU, **asked)  # type: ignore[arg-type]
        found = make_plan(spec, options, name="").options.kv_cache_dtype
        return found.value, found.origin

    assert dtype() == ("F8_E4M3", "config")
    assert dtype(kv_cache_dtype="bfloat16") == ("BF16", "flag")
    spec = replace(spec, kv_cache_quantization="nvfp4")
    with pytest.raises(UsageError) as e:
        dtype()
    assert e.value.message.startswith("the checkpoint asks for a KV cache in nvfp4: the builtin ")
    assert e.value.hint == "use --kv-cache-dtype bfloat16 or fp8, or --engine vllm"


def test_a_quantized_matrix_needs_room_only_while_it_is_used() -> None:
    def activations(tokens: int) -> Component:
        (rank,) = plan(
            "Qwen3-8B-FP8",
            device=CATALOGUE["h100-80gb"],
            max_num_seqs=1,
            max_num_batched_tokens=tokens,
        ).ranks
        return rank.component("activations")

    hidden, inner = 4096, 12288
    many = activations(8192)
    # While the activation is computed no matrix is used, and this is more than any of them needs.
    assert many.planned_bytes == 8192 * (2 * hidden + 3 * inner) * 2
    assert "its quantized matrix" not in many.formula
    few = activations(16)
    shared = 4 * CUDA_SPLIT_ELEMENTS
    assert few.planned_bytes == 16 * (2 * hidden + 2 * inner) * 2 + 16 * hidden * 2 + shared
    assert "for its quantized matrix" in few.formula


def test_refusals() -> None:
    with pytest.raises(UsageError) as e:
        plan(kv_cache_dtype="fp8_e5m2")
    assert e.value.message.startswith("--kv-cache-dtype fp8_e5m2: the builtin runtime stores keys ")
    with pytest.raises(UsageError) as e:
        plan(device=CATALOGUE["a100-80gb"], kv_cache_dtype="fp8")
    assert e.value.message == (
        "--kv-cache-dtype fp8: the builtin runtime's kernels need compute capability 8.9 for fp8, "
        "and the GPU has 8.0"
    )


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


def test_every_sequence_needs_a_token_of_a_step() -> None:
    with pytest.raises(UsageError, match="batched-tokens 4 is less than --max-num-seqs 8"):
        plan(max_num_seqs=8, max_num_batched_tokens=4)
    assert plan(max_num_batched_tokens=4).options.max_num_seqs.value == 4
    assert plan(max_num_seqs=600).options.max_num_batched_tokens.value == 600


@pytest.mark.parametrize("name", ["mi300x-192gb", "t4-16gb"])
def test_gpus_that_it_does_not_run_on(name: str) -> None:
    with pytest.raises(UsageError, match=f"does not run on {name}"):
        plan(device=CATALOGUE[name])
