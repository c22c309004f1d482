"""Plans as commands and deployments."""

import shlex
from dataclasses import replace
from typing import Any

import pytest
import yaml

from support.configs import read_spec
from tightfit.errors import DoesNotFitError, UsageError
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import CATALOGUE
from tightfit.planner.emit import emit
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Component, Plan
from tightfit.planner.spelling import plan_options
from tightfit.planner.vllm_command import parse_command
from tightfit.units import GiB

MODEL = "meta-llama/Llama-3.1-8B"


def planned(**given: Any) -> tuple[Plan, PlanOptions]:
    options = PlanOptions(**{"device": CATALOGUE["h100-80gb"], "max_model_len": 8192, **given})
    return make_plan(read_spec("Llama-3.1-8B"), options, name=MODEL), options


def pool(plan: Plan) -> int:
    assert plan.kv_cache.num_blocks is not None
    return plan.kv_cache.num_blocks * plan.kv_cache.bytes_per_block


def test_what_the_llm_class_takes_by_default_is_told_to_the_server() -> None:
    plan, options = planned(entrypoint="llm")
    assert plan.options.max_num_batched_tokens.value == 16_384
    parsed = parse_command(emit(plan, MODEL, "vllm", options=options))
    assert parsed.entrypoint == "server"
    again, _ = planned(**parsed.options)
    for name in ("max_num_batched_tokens", "max_num_seqs"):
        assert getattr(again.options, name).value == getattr(plan.options, name).value
    assert again.ranks[0].component("activations") == plan.ranks[0].component("activations")


def test_an_optimization_level_was_a_compilation_mode_before_0_12() -> None:
    given = {"engine_version": "0.11.0", "optimization_level": "2", "gpu": "h100-80gb"}
    options = plan_options(given)
    assert (options.optimization_level, options.compilation_config) == (None, {"mode": 2})
    plan = make_plan(read_spec("Llama-3.1-8B"), options, name=MODEL)
    assert plan.options.cudagraph_mode is not None
    assert plan.options.cudagraph_mode.value == "NONE"
    text = emit(plan, MODEL, "vllm", options=options)
    assert """--compilation-config '{"level":2}'""" in text
    new = plan_options(given | {"engine_version": "0.12.0"})
    assert new.optimization_level == 2


def test_a_command_is_read_back_as_the_plan_that_it_was_made_of() -> None:
    given: dict[str, Any] = {
        "max_num_seqs": 64,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.85,
        "kv_cache_dtype": "fp8",
        "dtype": "float16",
        "cudagraph_capture_sizes": (1, 2, 4),
        "limit_mm_per_prompt": {"image": {"count": 2, "width": 512}},
        "enable_prefix_caching": False,
        "use_v2_model_runner": True,
        "max_num_batched_tokens": 4096,
    }
    plan, options = planned(**given)
    text = emit(plan, MODEL, "vllm", options=options)
    assert "--host 127.0.0.1" in text
    parsed = parse_command(text)
    assert (parsed.model, parsed.warnings) == (MODEL, ())
    assert parsed.options == {**given, "max_model_len": 8192, "kv_cache_memory_bytes": pool(plan)}


def test_defaults_are_not_repeated() -> None:
    plan, _ = planned(max_model_len=None)
    assert parse_command(emit(plan, MODEL, "vllm")).options == {"kv_cache_memory_bytes": pool(plan)}
    assert parse_command(emit(plan, MODEL, "vllm", pin_kv_cache=False)).options == {}
    anywhere, _ = planned(device=None)
    assert parse_command(emit(anywhere, MODEL, "vllm")).options == {"max_model_len": 8192}


def test_a_fitted_length_is_emitted() -> None:
    plan, options = planned(max_model_len=-1, device=CATALOGUE["l4-24gb"])
    length = plan.options.max_model_len.value
    assert length < 131_072
    parsed = parse_command(emit(plan, MODEL, "vllm", options=options))
    assert parsed.options["max_model_len"] == length


def test_a_plan_of_the_emitted_command_is_the_same_plan() -> None:
    plan, options = planned(enforce_eager=True, max_num_seqs=32)
    parsed = parse_command(emit(plan, MODEL, "vllm", options=options, pin_kv_cache=False))
    again, _ = planned(**parsed.options)
    assert again == plan


def test_odd_names_are_quoted() -> None:
    plan, _ = planned()
    odd = "./my models/it's $HOME"
    assert shlex.split(emit(plan, odd, "vllm"))[2] == odd
    service = yaml.safe_load(emit(plan, odd, "compose"))["services"]["vllm"]
    assert service["command"][0] == "/models/it's $$HOME"


def test_compose() -> None:
    plan, options = planned(tensor_parallel_size=4)
    host = (Component(name="loading_peak", planned_bytes=5 * GiB, origin="derived", formula=""),)
    text = emit(replace(plan, host=host), MODEL, "compose", options=options)
    document = yaml.safe_load(text)
    service = document["services"]["vllm"]
    assert service["image"] == f"vllm/vllm-openai:v{plan.engine_version}"
    assert service["command"][:3] == [MODEL, "-tp", "4"]
    assert all(isinstance(word, str) for word in service["command"])
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["shm_size"] == "5120m"
    reserved = service["deploy"]["resources"]["reservations"]
    assert reserved["devices"] == [{"driver": "nvidia", "count": 4, "capabilities": ["gpu"]}]
    assert reserved["memory"] == "5120m"
    for volume in service["volumes"]:
        assert volume.split(":")[0] in document["volumes"]


def test_kubernetes() -> None:
    plan, options = planned(tensor_parallel_size=2, data_parallel_size=2)
    deployment, service = yaml.safe_load_all(emit(plan, MODEL, "k8s", options=options))
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    name = deployment["metadata"]["name"]
    assert name == "vllm-llama-3-1-8b"
    template = deployment["spec"]["template"]
    assert service["spec"]["selector"] == template["metadata"]["labels"]
    assert service["spec"]["type"] == "ClusterIP"
    (container,) = template["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    arguments = container["args"]
    at = arguments.index("--kv-cache-memory-bytes")
    assert arguments[at + 1] == str(pool(plan))
    assert "--data-parallel-size" in arguments
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in template["spec"]["volumes"]} >= {"shm"}


def test_no_path_of_this_machine_is_in_a_deployment() -> None:
    plan, _ = planned()
    for model in ("/home/me/hidden/llama", "hidden/models/llama", "./llama/config.json"):
        for kind in ("compose", "k8s"):
            text = emit(plan, model, kind)  # type: ignore[arg-type]
            assert "/home" not in text
            assert "hidden" not in text
            assert "/models/llama\n" in text
    assert "s3://bucket/a/llama\n" in emit(plan, "s3://bucket/a/llama", "compose")


@pytest.mark.parametrize(
    ("given", "kind", "match"),
    [
        ({"engine": "builtin"}, "vllm", "builtin"),
        ({"device": CATALOGUE["t4-16gb"]}, "k8s", "does not fit"),
        ({}, "helm", "helm"),
    ],
)
def test_what_cannot_be_emitted(given: dict[str, Any], kind: Any, match: str) -> None:
    plan, _ = planned(**given)
    error = DoesNotFitError if "device" in given else UsageError
    with pytest.raises(error, match=match):
        emit(plan, MODEL, kind)
