"""vLLM's CPU backend: what its log said of tiny models, and its own rules."""

from typing import Any

import pytest

from support.configs import read_config, read_spec
from tightfit.errors import UsageError
from tightfit.model.families import model_spec
from tightfit.model.spec import ModelSpec
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import Device
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.units import GiB, MiB

CPU = Device(name="cpu", total_bytes=64 * GiB, kind="cpu")
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 259,
}
BIG = TINY | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


def plan(model: ModelSpec | dict[str, Any], **options: Any) -> Plan:
    spec = model_spec(model) if isinstance(model, dict) else model
    asked = PlanOptions(
        **{"device": CPU, "entrypoint": "llm", "engine_version": "0.32.0"} | options
    )
    return make_plan(spec, asked, name="tiny")


def test_the_pool_of_an_explicit_size() -> None:
    """vLLM 0.32.0: "2,097,152 tokens, Maximum concurrency for 256 tokens per request: 8192.00x"."""
    kv = plan(TINY, cpu_kvcache_space=1.0).kv_cache
    assert (kv.block_size, kv.num_blocks, kv.tokens) == (128, 16384, 2_097_152)
    assert kv.max_concurrency == 8192


def test_the_environment_overrides_the_flag() -> None:
    both = plan(TINY, cpu_kvcache_space=2.0, kv_cache_memory_bytes=5 * MiB)
    assert both.options.kv_cache_memory_bytes.value == 2 * GiB
    assert plan(TINY, kv_cache_memory_bytes=5 * MiB).kv_cache.num_blocks == 80


@pytest.mark.parametrize(
    ("space", "version", "expected"),
    [
        (None, "0.10.2", 4 * GiB),
        (None, "0.12.0", 4 * GiB),
        (None, "0.15.1", 32 * GiB),
        (None, "0.19.1", 32 * GiB),
        (0.0, "0.19.1", 32 * GiB),
        (None, "0.20.2", None),
        (None, "0.32.0", None),
        (7.0, "0.32.0", 7 * GiB),
        (7.0, "0.10.2", 7 * GiB),
    ],
)
def test_the_pool_of_each_version(space: float | None, version: str, expected: int | None) -> None:
    options = plan(TINY, cpu_kvcache_space=space, engine_version=version).options
    assert options.kv_cache_memory_bytes.value == expected


def test_what_rss_says_decides_the_rest() -> None:
    """A worker of vLLM 0.32.0 said 2.10 GiB consumed eagerly, 2.29 compiled, 1.49 with two ranks.

    Of a Llama with 1.18 GiB of weights, by the server, with 2048 tokens a step.
    """
    server = {"entrypoint": "server", "max_model_len": 512}
    for consumed, options in (
        (2.10, {"enforce_eager": True}),
        (2.29, {}),
        (1.49, {"enforce_eager": True, "tensor_parallel_size": 2}),
    ):
        rank = plan(BIG, **server, **options).ranks[0]
        held = sum(
            c.planned_bytes for c in rank.components if c.inside_budget and c.name != "kv_cache"
        )
        assert held / GiB == pytest.approx(consumed, abs=0.06)
    budget = plan(BIG, **server, gpu_memory_utilization=0.3).ranks[0].budget_bytes
    assert budget is not None
    assert budget / GiB == pytest.approx(64 * 0.3)


def test_packed_tables_stay_beside_the_originals() -> None:
    """A larger vocabulary of 96000 x 2048 x 2 bytes more counted 1.46 GiB in the log; tied 0.94."""
    more = {"vocab_size": 128000}

    def held(config: dict[str, Any]) -> int:
        rank = plan(config, enforce_eager=True).ranks[0]
        return sum(rank.component(name).planned_bytes for name in ("weights", "weights_after_load"))

    base = held(BIG)
    assert (held(BIG | more) - base) / GiB == pytest.approx(1.46, abs=0.02)
    tied = held(BIG | more | {"tie_word_embeddings": True})
    assert (tied - base) / GiB == pytest.approx(0.94, abs=0.06)


@pytest.mark.parametrize(
    ("entrypoint", "ranks", "tokens", "seqs"),
    [("llm", 1, 4096, 256), ("server", 1, 2048, 128), ("server", 2, 4096, 256)],
)
def test_batches_grow_with_the_ranks(entrypoint: str, ranks: int, tokens: int, seqs: int) -> None:
    options = plan(BIG, entrypoint=entrypoint, tensor_parallel_size=ranks).options
    assert options.max_num_batched_tokens.value == tokens
    assert options.max_num_seqs.value == seqs
    assert options.max_num_seqs.origin == "engine default"


def test_one_batch_size_bounds_the_other() -> None:
    """vLLM 0.32.0 made 64 sequences of 64 tokens a step."""
    assert plan(TINY, max_num_batched_tokens=64).options.max_num_seqs.value == 64
    with pytest.raises(UsageError, match="is less than --max-num-seqs"):
        plan(TINY, max_num_batched_tokens=64, max_num_seqs=65)


def test_nothing_is_captured() -> None:
    made = plan(TINY)
    assert made.options.cudagraph_capture_sizes is not None
    assert made.options.cudagraph_capture_sizes.value == ()
    names = {component.name for component in made.ranks[0].components}
    assert not names & {"cuda_graphs", "cuda_context", "nccl", "non_torch"}
    assert made.options.async_scheduling is not None
    assert made.options.async_scheduling.value is False


@pytest.mark.parametrize(("version", "block_size"), [("0.10.2", 16), ("0.12.0", 128)])
def test_blocks_of_each_version(version: str, block_size: int) -> None:
    assert plan(TINY, engine_version=version).kv_cache.block_size == block_size


def test_blocks_that_the_kernels_take() -> None:
    assert plan(TINY, block_size=16).kv_cache.block_size == 16
    windowed = read_config("gemma-2-9b")
    assert plan(windowed, block_size=16).kv_cache.block_size == 32
    assert plan(read_spec("DeepSeek-V2-Lite"), block_size=64).kv_cache.block_size == 16


def test_latents_are_not_chunked() -> None:
    made = plan(read_spec("DeepSeek-V2-Lite"), max_model_len=16384, max_num_batched_tokens=512)
    assert made.options.max_num_batched_tokens.value == 16384


def test_weights_that_leave_nothing() -> None:
    made = plan(BIG, device=Device(name="cpu", total_bytes=2 * GiB, kind="cpu"))
    assert made.verdict.fits is False
    assert made.verdict.engine_message is not None
    assert "is less than requested memory for kv (-" in made.verdict.engine_message
    assert "/1.84 GiB). Reduce CPU memory" in made.verdict.engine_message


def test_a_pool_that_is_larger_than_memory() -> None:
    made = plan(TINY, kv_cache_memory_bytes=100 * GiB)
    assert made.verdict.fits is False
    assert made.verdict.engine_message is not None
    assert "requested memory for kv (100.00 GiB)" in made.verdict.engine_message


def test_a_sequence_that_needs_more_than_the_pool() -> None:
    made = plan(TINY, kv_cache_memory_bytes=100_000)
    assert made.verdict.engine_message is not None
    assert made.verdict.engine_message.startswith("To serve at least one request")


def test_the_variable_is_in_whole_gib() -> None:
    with pytest.raises(UsageError, match="whole number of GiB"):
        plan(TINY, cpu_kvcache_space=1.5)
