"""The nine models on which planners go wrong: weights, parameters and one sequence, to the byte."""

from pathlib import Path
from typing import Any

import pytest

from support.configs import read_config
from support.probes import PROBES, TOKENS, write_virtual
from tightfit.model.families import model_spec
from tightfit.planner.api import plan_model
from tightfit.planner.assemble import make_plan
from tightfit.planner.options import PlanOptions

BF16 = PlanOptions(
    max_model_len=TOKENS,
    kv_cache_dtype="bfloat16",
    mamba_cache_dtype="bfloat16",
    mamba_ssm_cache_dtype="bfloat16",
)


def long_enough(name: str) -> dict[str, Any]:
    """The config, of a model that takes `TOKENS` tokens: Nemotron-H allows 8192."""
    config = read_config(name)
    if config.get("max_position_embeddings", TOKENS) < TOKENS:
        config["max_position_embeddings"] = TOKENS
    return config


def test_arithmetic_is_the_published() -> None:
    """Totals of the published files, and of transformers' modules in their dtypes."""
    known = {
        "Llama-3.1-8B": (16_060_522_496, 4_294_967_296),
        "Qwen3-30B-A3B": (61_064_245_248, 3_221_225_472),
        # transformers keeps the biases of 58 routers as buffers: 59,392 bytes that files hold.
        "DeepSeek-V3": (673_150_552_416 + 58 * 256 * 4, 2_302_672_896),
        "gemma-3-27b-it": (54_864_813_280, 3_120_562_176),
        "gpt-oss-120b": (65_248_815_744, 1_212_678_144),
        "Qwen2.5-VL-7B-Instruct": (16_584_333_312, 1_879_048_192),
        "Nemotron-H-8B-Base-8K": (16_201_705_472, 588_677_120),
        "granite-4.0-h-small": (64_414_675_968, 614_193_152),
        "mamba2-780m": (1_560_322_560, 38_707_200),
    }
    assert {n: (p.checkpoint_bytes, p.cache_bytes) for n, p in PROBES.items()} == known


@pytest.mark.parametrize("name", PROBES)
def test_from_the_config(name: str) -> None:
    probe = PROBES[name]
    plan = make_plan(model_spec(long_enough(name)), BF16, name=name)
    assert plan.model.weights_origin == "shapes"
    assert plan.model.params == probe.params
    assert plan.model.checkpoint_bytes == probe.checkpoint_bytes
    cache = plan.kv_cache
    assert cache.minimum_bytes == probe.cache_bytes
    assert cache.minimum_bytes <= cache.reserved_bytes
    assert cache.minimum_bytes <= cache.all_full_bytes


@pytest.mark.parametrize("name", PROBES)
def test_from_headers(name: str, tmp_path: Path) -> None:
    """Files of up to 673 GB, of which only the headers are there: the rest are holes."""
    write_virtual(tmp_path / name, long_enough(name))
    plan = plan_model(str(tmp_path / name), BF16).plan
    assert plan.model.weights_origin == "headers"
    assert plan.model.params == PROBES[name].params
    assert plan.model.checkpoint_bytes == PROBES[name].checkpoint_bytes
    assert plan.kv_cache.minimum_bytes == PROBES[name].cache_bytes


@pytest.mark.parametrize("name", PROBES)
def test_headers_hold_as_many_bytes_as_the_files(name: str, tmp_path: Path) -> None:
    """Nothing beside the tensors of the published checkpoint was invented to fill the total."""
    write_virtual(tmp_path, read_config(name))
    file = tmp_path / "model.safetensors"
    with file.open("rb") as opened:
        head_bytes = 8 + int.from_bytes(opened.read(8), "little")
    assert file.stat().st_size - head_bytes == PROBES[name].checkpoint_bytes
