"""Encoders under vLLM: what is built, what is profiled, and what that holds."""

from math import prod
from typing import Any

import pytest

from support.configs import read_spec
from tightfit.errors import UsageError
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import parameter_count
from tightfit.model.spec import ModelSpec
from tightfit.planner.engines.vllm_media import (
    EncoderProfile,
    built,
    encoder_cache,
    encoder_profile,
    encoder_run,
)
from tightfit.planner.options import PlanOptions


def profile(name: str, max_model_len: int, **changes: Any) -> EncoderProfile:
    found = optional_profile(name, max_model_len, **changes)
    assert found is not None
    return found


def optional_profile(
    name: str, max_model_len: int, *, batch: int = 8192, seqs: int = 256, **changes: Any
) -> EncoderProfile | None:
    return encoder_profile(
        read_spec(name),
        PlanOptions(**changes),
        max_model_len=max_model_len,
        max_num_batched_tokens=batch,
        max_num_seqs=seqs,
    )


# In vLLM's words: "Encoder cache will be initialized with a budget of B tokens, and profiled with
# N M items of the maximum feature size."
@pytest.mark.parametrize(
    ("name", "length", "changes", "budget", "items", "modality"),
    [
        ("llava-1.5-7b-hf", 4096, {}, 8192, 14, "image"),
        ("llava-1.5-7b-hf", 4096, {"batch": 2048}, 2048, 3, "image"),
        (
            "llava-1.5-7b-hf",
            4096,
            {"limit_mm_per_prompt": {"image": 2}, "seqs": 3},
            8192,
            6,
            "image",
        ),
        ("Qwen2.5-VL-7B-Instruct", 128_000, {}, 114_688, 1, "video"),
        (
            "Qwen2.5-VL-7B-Instruct",
            128_000,
            {"limit_mm_per_prompt": {"video": 0}},
            16_384,
            1,
            "image",
        ),
        (
            "Qwen2.5-VL-7B-Instruct",
            128_000,
            {"limit_mm_per_prompt": {"video": 0}, "mm_processor_kwargs": {"max_pixels": 1_003_520}},
            8192,
            6,
            "image",
        ),
        ("Qwen3-VL-8B-Instruct", 262_144, {}, 16_384, 1, "image"),
        ("InternVL3-1B", 32_768, {"limit_mm_per_prompt": {"video": 0}}, 8192, 2, "image"),
        ("Kimi-K2.5", 262_144, {}, 8192, 1, "vision_chunk"),
        ("Phi-3-vision", 8192, {"enable_chunked_prefill": False, "seqs": 2}, 8192, 3, "image"),
    ],
)
def test_budgets(
    name: str, length: int, changes: dict[str, Any], budget: int, items: int, modality: str
) -> None:
    found = profile(name, length, **changes)
    assert (found.budget_tokens, found.items, found.item.modality) == (budget, items, modality)


@pytest.mark.parametrize(
    "changes",
    [
        {"language_model_only": True},
        {"limit_mm_per_prompt": {"image": 0, "video": 0}},
        {"limit_mm_per_prompt": {"image": {"count": 0}, "video": 0}},
        {"skip_mm_profiling": True},
    ],
)
def test_nothing_is_profiled(changes: dict[str, Any]) -> None:
    assert optional_profile("Qwen3-VL-2B-Instruct", 8192, **changes) is None


def test_a_text_model_has_no_encoder() -> None:
    spec = read_spec("Qwen3-8B")
    assert optional_profile("Qwen3-8B", 8192) is None
    assert built(spec, PlanOptions()) is spec


def tower_elements(spec: ModelSpec, size: int = 1) -> int:
    rank = Rank(parallel=Parallel(tensor_parallel_size=size))
    return sum(prod(w.rank_shape(rank)) for tower in spec.towers for w in tower.weights)


def test_what_is_built() -> None:
    spec = read_spec("Qwen3-VL-2B-Instruct")
    assert parameter_count(built(spec, PlanOptions())) == parameter_count(spec)
    only_images = PlanOptions(limit_mm_per_prompt={"video": 0})
    assert tower_elements(built(spec, only_images)) == tower_elements(spec)
    for options in (
        PlanOptions(language_model_only=True),
        PlanOptions(limit_mm_per_prompt={"video": 0, "image": 0}),
    ):
        assert built(spec, options).towers == ()
        assert parameter_count(built(spec, options)) == parameter_count(spec) - tower_elements(spec)


def test_data_parallel_encoders_are_whole_on_every_rank() -> None:
    options = PlanOptions(mm_encoder_tp_mode="data", tensor_parallel_size=4)
    spec = read_spec("Qwen3-VL-2B-Instruct")
    whole = built(spec, options)
    assert tower_elements(whole, 4) == tower_elements(spec)
    assert tower_elements(built(spec, PlanOptions()), 4) < tower_elements(spec) / 3
    llava = read_spec("llava-1.5-7b-hf")
    assert tower_elements(built(llava, options), 4) < tower_elements(llava) / 3


def test_llava_without_what_vllm_leaves_out() -> None:
    spec = read_spec("llava-1.5-7b-hf")
    # The last of 24 layers of 1024 features, and the last norm.
    layer = 4 * 1024 * 1025 + 2 * 1024 * 4096 + 1024 + 4096 + 4 * 1024
    difference = parameter_count(spec) - parameter_count(built(spec, PlanOptions()))
    assert difference == layer + 2 * 1024


def test_bytes_of_the_cache() -> None:
    found = encoder_cache(profile("Qwen2.5-VL-7B-Instruct", 128_000), 2)
    assert found.nbytes == 114_688 * 3584 * 2
    assert found.formula == "1 x 114688 embeddings x 3584 features x 2 B"
    deep = encoder_cache(profile("Qwen3-VL-8B-Instruct", 262_144), 2)
    assert deep.nbytes == 16_384 * 4 * 4096 * 2


def test_bytes_of_a_run() -> None:
    video = profile("Qwen2.5-VL-7B-Instruct", 128_000)
    options = PlanOptions()
    run = encoder_run(video, options, 2, 1)
    # 3 x 1280 features, 3 x 3420 inside the gated MLP, a table of 80; and the pixels.
    patches = 458_752
    assert run.nbytes == patches * (3 * 1280 + 3 * 3420 + 80 + 3 * 2 * 14 * 14) * 2
    assert "458752 patches x 14180 features at the MLP" in run.formula
    shared = encoder_run(video, options, 2, 4)
    # A fourth of the inner features on each rank, and everything else whole.
    assert shared.nbytes == patches * (3 * 1280 + 3 * 855 + 80 + 1176) * 2


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("llava-1.5-7b-hf", 4 * 1024 + 2 * 4096),
        ("Qwen2-VL-7B", 3 * 1280 + 2 * 5120 + 80),
        ("Qwen2.5-VL-7B-Instruct", 14_180),
        ("Qwen3-VL-8B-Instruct", 3 * 1152 + 8 * 1152 + 72 + 1152 + 3 * 4096 // 4),
        ("GLM-4.5V", 20_096),
        ("InternVL3-1B", 12_288),
        ("Kimi-K2.5", 4 * 1152 + 2 * 4304 + 2 * 72),
        ("Phi-3-vision", 12_288),
    ],
)
def test_features_alive_per_position(name: str, features: int) -> None:
    """As counted on vLLM 0.32's own towers, run on the meta device with all its tensors watched."""
    found = profile(name, 32_768)
    run = encoder_run(found, PlanOptions(), 2, 1).nbytes // 2 - found.items * found.item.inputs
    assert run == found.items * found.item.patches * features


def test_ranks_share_the_items_of_a_data_parallel_run() -> None:
    options = PlanOptions(mm_encoder_tp_mode="data", limit_mm_per_prompt={"video": 0},
                          mm_processor_kwargs={"max_pixels": 1_003_520})  # fmt: skip
    found = encoder_profile(
        read_spec("Qwen2.5-VL-7B-Instruct"),
        options,
        max_model_len=32_768,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
    )
    assert found is not None
    assert found.items == 6
    one, four = (encoder_run(found, options, 2, size).nbytes for size in (1, 4))
    inputs = 6 * found.item.inputs * 2
    assert four - inputs == (one - inputs) // 3


def test_smaller_images_need_less() -> None:
    large = profile("Qwen3-VL-8B-Instruct", 32_768)
    small = profile(
        "Qwen3-VL-8B-Instruct",
        32_768,
        limit_mm_per_prompt={"image": {"count": 1, "width": 512, "height": 512}, "video": 0},
    )
    assert (large.budget_tokens, small.budget_tokens) == (16_384, 16_384)
    assert small.item.embeddings == 256
    options = PlanOptions()
    assert encoder_run(small, options, 2, 1).nbytes * 50 < encoder_run(large, options, 2, 1).nbytes


@pytest.mark.parametrize(
    "limits",
    [
        {"image": -1},
        {"image": "two"},
        {"image": {"count": 1.5}},
        {"image": {"width": 0}},
        {"image": {"height": True}},
    ],
)
def test_malformed_limits(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--limit-mm-per-prompt"):
        optional_profile("Qwen3-VL-2B-Instruct", 8192, limit_mm_per_prompt=limits)
