from typing import Any

import pytest

from tightfit.errors import UsageError
from tightfit.planner.devices import CATALOGUE
from tightfit.planner.options import PlanOptions
from tightfit.planner.spelling import option_name, plan_options


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("tp", "4", 4),
        ("max_model_len", "32k", 32_000),
        ("max-model-len", "32K", 32_768),
        ("--max-model-len", "auto", -1),
        ("kv_cache_memory_bytes", "5GB", 5 * 10**9),
        ("kv_cache_memory_bytes", "8G", 8 * 2**30),
        ("kv_cache_memory_bytes", "25.5g", 25_500_000_000),
        ("gpu_memory_utilization", "0.95", 0.95),
        ("enforce_eager", "true", True),
        ("enforce_eager", "off", False),
        ("cudagraph_capture_sizes", "1,2 4", (1, 2, 4)),
        ("cudagraph_capture_sizes", "[1, 2]", (1, 2)),
        ("cudagraph_capture_sizes", [1, 2], (1, 2)),
        ("cc", "3", {"mode": 3}),
        ("cc", '{"cudagraph_mode": "NONE"}', {"cudagraph_mode": "NONE"}),
        ("compilation_config", {"mode": 0}, {"mode": 0}),
        ("limit_mm_per_prompt", '{"image": 2}', {"image": 2}),
        ("cpu_offload_gb", "4", 4.0),
        ("cpu_offload_gb", "4GiB", 4.0),
        ("cpu_offload_gb", 4, 4.0),
        ("kv_offloading_size", "512MiB", 0.5),
        ("quantization", "fp8", "fp8"),
    ],
)
def test_values(name: str, text: object, value: object) -> None:
    options = plan_options({name: text})
    assert getattr(options, option_name(name)) == value


def test_what_is_not_given_is_the_engines() -> None:
    assert plan_options({"max_model_len": None, "dtype": None}) == PlanOptions()


def test_devices() -> None:
    assert plan_options({"gpu": "h100"}).device is CATALOGUE["h100-80gb"]
    device = plan_options({"engine": "builtin"}).device
    assert device is not None
    assert device.kind == "cpu"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_modell_len": 1}, "unknown option 'max_modell_len'"),
        ({"device": "h100"}, "unknown option 'device'"),
        ({"tp": "two"}, "--tensor-parallel-size 'two' is not a number"),
        ({"tp": 2.5}, "--tensor-parallel-size 2.5 is of the wrong type"),
        ({"max_model_len": 2.5}, "--max-model-len 2.5 is not a whole number"),
        ({"enforce_eager": "maybe"}, "--enforce-eager 'maybe' is neither true nor false"),
        ({"cc": "{"}, "--compilation-config '{' is not JSON"),
        ({"cc": "[1]"}, "--compilation-config [1] is not a JSON object"),
        ({"limit_mm_per_prompt": "1"}, "--limit-mm-per-prompt 1 is not a JSON object"),
        ({"cpu_offload_gb": "much"}, "'much' is not a size"),
        ({"cpu_offload_gb": -1.0}, "'-1.0' is not a size"),
        ({"mm_encoder_tp_mode": "rows"}, "unknown --mm-encoder-tp-mode 'rows'"),
        ({"max_num_seqs": "1k"}, "--max-num-seqs '1k' is not a number"),
        ({"optimization_level": 4}, "-O 4 is out of range"),
        ({"entrypoint": "batch"}, "unknown --entrypoint 'batch'"),
        ({"optimization_level": -1}, "--optimization-level -1 is out of range"),
        ({"gpu_memory_utilization": "nan"}, "--gpu-memory-utilization nan is out of range"),
    ],
)
def test_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as e:
        plan_options(given)
    assert e.value.message.startswith(message)
    assert e.value.hint
