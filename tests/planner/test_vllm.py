"""Plans for vLLM: exact weights, its defaults, its verdict and its own words."""

import pytest

from support.configs import read_config, read_spec
from tightfit.errors import LayoutError, UsageError
from tightfit.model.families import model_spec
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import CATALOGUE, Device
from tightfit.planner.engines.vllm import VLLM
from tightfit.planner.headroom import shortage_bytes
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.units import GiB

H100 = CATALOGUE["h100-80gb"]


def plan(name: str = "Llama-3.1-8B", **options: object) -> Plan:
    return make_plan(read_spec(name), PlanOptions(**options), name=name)  # type: ignore[arg-type]


def weights(result: Plan) -> list[int]:
    return [rank.component("weights").planned_bytes for rank in result.ranks]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("Llama-3.1-8B", {}, [16_060_522_496]),
        ("Llama-3.1-8B", {"tensor_parallel_size": 4}, [4_015_529_984] * 4),
        ("Llama-3.1-8B", {"dtype": "float32"}, [2 * 16_060_522_496]),
        # Two stages share the layers; the table is on the first and the head on the last.
        (
            "Llama-3.1-8B",
            {"pipeline_parallel_size": 2},
            [16 * 436_224_000 + 1_050_673_152, 16 * 436_224_000 + 1_050_673_152 + 8192],
        ),
        # A tied model holds its table once on one stage, and on both ends of two.
        ("SmolLM2-135M", {}, [269_030_016]),
        (
            "SmolLM2-135M",
            {"pipeline_parallel_size": 2},
            [106_202_880 + 56_623_104, 106_202_880 + 56_623_104 + 1152],
        ),
    ],
)
def test_weights(name: str, options: dict[str, object], expected: list[int]) -> None:
    assert weights(plan(name, **options)) == expected


def test_padding_and_copies_are_told() -> None:
    config = read_config("Llama-3.1-8B") | {"vocab_size": 128_257}
    result = make_plan(model_spec(config), PlanOptions(tensor_parallel_size=16), name="x")
    details = [rank.component("weights").detail for rank in result.ranks]
    assert sum(d["padding_bytes"] for d in details) == 2 * 63 * 4096 * 2
    # Eight KV heads on sixteen ranks: every second rank repeats its neighbour.
    kv_bytes = 32 * 2 * 128 * 4096 * 2
    norms = 65 * 4096 * 2
    assert [d["copied_bytes"] for d in details] == [0] + [kv_bytes + norms, norms] * 7 + [
        kv_bytes + norms
    ]


@pytest.mark.parametrize(
    ("device", "entrypoint", "batched", "seqs"),
    [
        (None, "server", 8192, 1024),
        (H100, "server", 8192, 1024),
        (H100, "llm", 16384, 1024),
        (CATALOGUE["a100-80gb"], "server", 2048, 256),
        (CATALOGUE["a100-80gb"], "llm", 8192, 256),
        (CATALOGUE["l4-24gb"], "server", 2048, 256),
        (CATALOGUE["b200-180gb"], "server", 16384, 1024),
    ],
)
def test_batch_defaults(device: Device | None, entrypoint: str, batched: int, seqs: int) -> None:
    options = plan("Qwen3-0.6B", device=device, entrypoint=entrypoint).options
    assert (options.max_num_batched_tokens.value, options.max_num_seqs.value) == (batched, seqs)


@pytest.mark.parametrize(
    ("name", "options", "tokens"),
    [
        # A start-up log of vLLM 0.25.1 says 2496.
        ("gemma-4-26B-A4B", {}, 32 * 78),
        ("gemma-4-26B-A4B", {"limit_mm_per_prompt": {"video": {"num_frames": 28}}}, 28 * 78),
        ("gemma-4-26B-A4B", {"language_model_only": True}, 2048),
        ("gemma-4-26B-A4B", {"max_num_batched_tokens": 1024}, 1024),
        ("gemma-4-E2B", {}, 2048),
    ],
)
def test_items_that_see_both_ways_fit_into_a_step(
    name: str, options: dict[str, object], tokens: int
) -> None:
    engine = VLLM(CATALOGUE["l40s-48gb"])
    asked = PlanOptions(device=engine.device, **options)  # type: ignore[arg-type]
    spec = engine.adapt(read_spec(name), asked)
    assert engine.resolve(spec, asked).max_num_batched_tokens.value == tokens


@pytest.mark.parametrize(("version", "seqs"), [("0.32.0", 1024), ("0.33.0", 256)])
def test_a_device_with_much_memory_may_be_small(version: str, seqs: int) -> None:
    options = plan(device=CATALOGUE["gb10-128gb"], engine_version=version).options
    assert options.max_num_seqs.value == seqs


@pytest.mark.parametrize(("version", "told"), [("0.34.1", True), ("0.33.7", False)])
def test_versions_that_nobody_has_read(version: str, told: bool) -> None:
    expected = ("vLLM 0.34.1 is newer than 0.33.0, whose rules were used",) if told else ()
    assert plan(engine_version=version).warnings == expected


def test_origins() -> None:
    options = plan(device=H100, max_num_seqs=7, gpu_memory_utilization=0.5).options
    origins = {name: option["origin"] for name, option in options.to_json().items()}
    assert origins == {
        "dtype": "config",
        "kv_cache_dtype": "engine default",
        "max_model_len": "config",
        "max_num_seqs": "flag",
        "max_num_batched_tokens": "engine default",
        "gpu_memory_utilization": "flag",
        "kv_cache_memory_bytes": "engine default",
        "block_size": "engine default",
        "tensor_parallel_size": "flag",
        "pipeline_parallel_size": "flag",
        "enforce_eager": "engine default",
        "cudagraph_capture_sizes": "engine default",
        "model_runner": "engine default",
        "cudagraph_mode": "engine default",
        "quantization": "config",
        "data_parallel_size": "engine default",
        "enable_expert_parallel": "engine default",
        "enable_prefix_caching": "engine default",
        "async_scheduling": "engine default",
    }
    assert options.gpu_memory_utilization.value == 0.5
    assert options.dtype.value == "BF16"
    assert plan("OLMo-2-7B").options.dtype.origin == "engine default"
    assert plan(dtype="half").options.dtype == plan(dtype="float16").options.dtype


def test_llama_on_an_h100() -> None:
    result = plan(device=H100)
    budget = -(-H100.total_bytes * 92 // 100)
    kv, rank = result.kv_cache, result.ranks[0]
    inside = [c for c in rank.components if c.inside_budget and c.name != "kv_cache"]
    available = budget - sum(c.planned_bytes for c in inside)
    assert available < budget - 16_060_522_496
    assert result.ranks[0].budget_bytes == budget
    assert kv.available_bytes == available
    assert kv.num_blocks == available // 2_097_152
    assert kv.max_concurrency == kv.num_blocks / 8192
    assert kv.tokens == int(kv.num_blocks / 8192 * 131_072)
    assert result.ranks[0].component("kv_cache").planned_bytes == kv.num_blocks * 2_097_152
    headroom = result.ranks[0].headroom_bytes
    assert headroom is not None
    assert 0 <= headroom < 2_097_152
    assert result.verdict.fits
    assert result.verdict.engine_message is None
    assert result.verdict.max_model_len_that_fits == 131_072


def test_the_message_that_vllm_prints() -> None:
    verdict = plan(kv_cache_memory_bytes=10 * GiB, max_model_len=131_072).verdict
    assert verdict.fits is False
    assert verdict.max_model_len_that_fits == 81_904
    assert verdict.engine_message == (
        "To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache "
        "is needed, which is larger than the available KV cache memory (10.0 GiB). Based on the "
        "available memory, the estimated maximum model length is 81904. Try increasing "
        "`gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or "
        "decreasing `max_model_len` when initializing the engine. See "
        "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
    )


def test_no_memory_at_all() -> None:
    verdict = plan(device=CATALOGUE["t4-16gb"]).verdict
    assert verdict.fits is False
    assert verdict.reason == "a rank holds 16.8 GiB before any KV cache, and its budget is 13.4 GiB"
    assert verdict.max_model_len_that_fits == 0
    assert verdict.engine_message is not None
    assert verdict.engine_message.startswith("No available memory for the cache blocks. Try ")


def test_a_given_pool_must_fit_into_the_device() -> None:
    device = Device(name="small", total_bytes=24 * GiB)
    verdict = plan(device=device, kv_cache_memory_bytes=40 * GiB).verdict
    assert verdict.fits is False
    assert verdict.reason == (
        "with a KV cache of 40.0 GiB a rank needs 33.0 GiB more than its device has"
    )
    assert verdict.engine_message == "torch.OutOfMemoryError: CUDA out of memory."
    assert verdict.max_model_len_that_fits == 0
    assert plan(device=device, kv_cache_memory_bytes=6 * GiB, max_model_len=8192).verdict.fits


def test_longest_that_fits() -> None:
    device = CATALOGUE["l4-24gb"]
    fitted = plan(device=device, max_model_len=-1)
    length = fitted.options.max_model_len
    assert length.origin == "fitted"
    assert fitted.verdict.fits
    assert fitted.verdict.max_model_len_that_fits == length.value
    assert plan(device=device, max_model_len=length.value).verdict.fits
    assert not plan(device=device, max_model_len=length.value + 1).verdict.fits


def test_without_a_device_there_is_no_verdict() -> None:
    result = plan()
    assert result.verdict.fits is None
    assert result.verdict.reason == (
        "no device given: a rank needs 33.6 GiB for one sequence of 131,072 tokens"
    )
    assert result.ranks[0].budget_bytes is result.ranks[0].headroom_bytes is None


def test_the_rank_with_least_room_decides() -> None:
    """The last of three stages has the head but fewer layers."""
    result = plan("gemma-2-9b", device=CATALOGUE["l4-24gb"], pipeline_parallel_size=4)
    assert len({rank.component("kv_cache").planned_bytes for rank in result.ranks}) > 1
    blocks = {rank.component("kv_cache").formula.split(" blocks")[0] for rank in result.ranks}
    assert blocks == {f"{result.kv_cache.num_blocks:,}"}
    assert all((rank.headroom_bytes or 0) >= 0 for rank in result.ranks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 131_073}, "--max-model-len 131073 is more than the model's 131072"),
        ({"max_model_len": 0}, "--max-model-len 0 is out of range"),
        ({"max_model_len": -2}, "--max-model-len -2 is out of range"),
        ({"max_num_seqs": 0}, "--max-num-seqs 0 is out of range"),
        ({"max_num_batched_tokens": 0}, "--max-num-batched-tokens 0 is out of range"),
        ({"block_size": -1}, "--block-size -1 is out of range"),
        ({"block_size": 8}, "--block-size 8: attention on a GPU reads 16 tokens at a time"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size 0 is out of range"),
        ({"pipeline_parallel_size": 2**60}, f"--pipeline-parallel-size {2**60} is out of range"),
        ({"kv_cache_memory_bytes": -1}, "--kv-cache-memory-bytes -1 is out of range"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization 0.0 is out of range"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization 1.5 is out of range"),
        ({"gpu_memory_utilization": float("nan")}, "--gpu-memory-utilization nan is out of range"),
        ({"dtype": "int8"}, "unknown --dtype 'int8'"),
        ({"kv_cache_dtype": "int3"}, "unknown --kv-cache-dtype 'int3'"),
        ({"engine": "sglang"}, "unknown --engine 'sglang'"),
        ({"engine_version": "0.1"}, "vLLM 0.1 is not modelled"),
        (
            {"max_num_batched_tokens": 8, "max_num_seqs": 9},
            "--max-num-batched-tokens 8 is less than --max-num-seqs 9",
        ),
    ],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as e:
        plan(**options)
    assert e.value.message == message
    assert e.value.hint


def test_impossible_layouts() -> None:
    with pytest.raises(LayoutError) as e:
        plan(tensor_parallel_size=3)
    assert e.value.message == "tensor parallel size 3 does not divide num_attention_heads = 32"
    assert e.value.hint == "tensor parallel sizes that work: 1, 2, 4, 8, 16, 32"
    with pytest.raises(LayoutError) as e:
        plan(pipeline_parallel_size=33)
    assert e.value.message == "pipeline parallel size 33 is more than num_hidden_layers = 32"


@pytest.mark.parametrize(("kind", "length"), [("linear", 8192), ("dynamic", 8192), ("yarn", 4096)])
def test_scaled_context(kind: str, length: int) -> None:
    scaling = {"rope_type": kind, "factor": 2.0}
    config = read_config("Llama-2-7b-hf") | {
        "rope_scaling": scaling,
        "max_position_embeddings": 4096,
    }
    result = make_plan(model_spec(config), PlanOptions(), name="x")
    assert result.options.max_model_len.value == length


@pytest.mark.parametrize(
    ("share", "fits"), [(0.98, True), (0.99, True), (0.994, False), (1.0, False)]
)
def test_a_budget_has_to_be_free_at_the_start(share: float, fits: bool) -> None:
    """The first look at the device comes after the CUDA context, half a GiB."""
    result = plan(device=H100, gpu_memory_utilization=share, max_model_len=4096)
    assert result.verdict.fits is fits
    if not fits:
        assert "Free memory on device cuda:0 (" in (result.verdict.engine_message or "")
        assert "the budget is" in result.verdict.reason


@pytest.mark.parametrize("blocks", [100, 1_000_000])
def test_blocks_that_the_user_counts_are_what_there_is(blocks: int) -> None:
    result = plan(device=H100, num_gpu_blocks_override=blocks)
    kv = result.kv_cache
    assert result.verdict.fits is False
    assert kv.available_bytes == blocks * kv.bytes_per_block == blocks * 2 * 2**20
    if blocks == 100:
        assert "(0.19 GiB)" in (result.verdict.engine_message or "")
        assert result.verdict.max_model_len_that_fits == 99 * 16
    assert shortage_bytes(result) > 0


@pytest.mark.parametrize(
    ("size", "shared", "hint"),
    [(2, 2, "a --tensor-parallel-size of 16 at least"), (32, 8, "at most 4 here")],
)
def test_ranks_that_share_a_context_hold_the_same_heads(size: int, shared: int, hint: str) -> None:
    with pytest.raises(UsageError) as e:
        plan(tensor_parallel_size=size, decode_context_parallel_size=shared)
    assert hint in (e.value.hint or "")
    plan(tensor_parallel_size=32, decode_context_parallel_size=4)
