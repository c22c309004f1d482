"""The document of schema 1, and what holds of every plan."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.configs import MODELS, read_config, read_spec
from tightfit import __version__
from tightfit.errors import TightfitError, UsageError
from tightfit.model.families import model_spec
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import CATALOGUE, Device
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import COMPONENTS, Plan
from tightfit.planner.resolve import model_max_len
from tightfit.units import GiB

COMPONENT = {"name": str, "planned_bytes": int, "origin": str, "formula": str}
KV_CACHE = {
    "dtype": str,
    "block_size": int,
    "bytes_per_block": int,
    "bytes_per_token": int,
    "available_bytes": int,
    "num_blocks": int,
    "tokens": int,
    "max_concurrency": float,
    "one_sequence": {"minimum_bytes": int, "reserved_bytes": int, "all_full_bytes": int},
}
SCHEMA_1: dict[str, Any] = {
    "schema": int,
    "tightfit": str,
    "model": {
        "name": str,
        "architecture": str,
        "params": int,
        "checkpoint_bytes": int,
        "weights_origin": str,
    },
    "engine": {"name": str, "version": str, "entrypoint": str},
    "device": {"name": str, "total_bytes": int, "usable_bytes": int},
    "options": dict,
    "ranks": [
        {
            "rank": int,
            "pp_rank": int,
            "tp_rank": int,
            "components": [COMPONENT],
            "budget_bytes": int,
            "total_bytes": int,
            "headroom_bytes": int,
            "driver_used_bytes": (int, type(None)),
        }
    ],
    "kv_cache": KV_CACHE,
    "host": {"components": list, "total_bytes": int},
    "verdict": {
        "fits": bool,
        "reason": str,
        "engine_message": type(None),
        "max_model_len_that_fits": int,
    },
    "advice": list,
    "not_modelled": [str],
    "warnings": list,
}


def matches(value: Any, schema: Any, path: str = "") -> None:
    """Exactly these keys, and values of these types; a component may say more."""
    if isinstance(schema, dict):
        optional = {"detail", "measured_bytes", "inside_budget"} if schema is COMPONENT else set()
        assert value.keys() - optional == schema.keys(), path
        for key, inner in schema.items():
            matches(value[key], inner, f"{path}.{key}")
    elif isinstance(schema, list):
        assert value, path
        for item in value:
            matches(item, schema[0], f"{path}[]")
    else:
        types = schema if isinstance(schema, tuple) else (schema,)
        assert type(value) in types, path


@pytest.mark.parametrize("engine", ["vllm", "builtin"])
def test_schema_1(engine: str) -> None:
    options = PlanOptions(engine=engine, device=CATALOGUE["h100-80gb"], tensor_parallel_size=2)
    plan = make_plan(read_spec("Qwen3-8B"), options, name="Qwen3-8B")
    document = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    matches(document, SCHEMA_1)
    assert document["schema"] == 1
    assert document["tightfit"] == __version__
    assert document["model"] == {
        "name": "Qwen3-8B",
        "architecture": "Qwen3ForCausalLM",
        "params": 8_190_735_360,
        "checkpoint_bytes": 2 * 8_190_735_360,
        "weights_origin": "shapes",
    }
    assert document["device"]["usable_bytes"] == document["ranks"][0]["budget_bytes"]
    assert [rank["tp_rank"] for rank in document["ranks"]] == [0, 1]
    names = [component["name"] for component in document["ranks"][0]["components"]]
    assert names[:2] == ["weights", "kv_cache"]
    assert set(names) <= set(COMPONENTS)
    origins = {option["origin"] for option in document["options"].values()}
    assert origins <= {"flag", "config", "engine default", "fitted"}


def test_schema_1_without_a_device() -> None:
    plan = make_plan(read_spec("Qwen3-8B"), PlanOptions(), name="Qwen3-8B")
    document = plan.to_json()
    assert document["device"] is None
    nothing = {"available_bytes": None, "num_blocks": None, "tokens": None, "max_concurrency": None}
    assert document["kv_cache"].items() >= nothing.items()
    assert document["verdict"]["fits"] is document["verdict"]["max_model_len_that_fits"] is None


def test_headers_are_said() -> None:
    plan = make_plan(read_spec("Qwen3-8B"), PlanOptions(), name="x", checkpoint_bytes=60)
    model = plan.to_json()["model"]
    assert (model["weights_origin"], model["checkpoint_bytes"]) == ("headers", 60)


devices = st.none() | st.builds(
    Device,
    name=st.just("some"),
    total_bytes=st.integers(GiB // 8, 300 * GiB),
    kind=st.sampled_from(["cuda", "cpu"]),
)
numbers = st.one_of(st.none(), st.integers(-2, 20), st.integers(-(2**60), 2**60))
options = st.fixed_dictionaries(
    {"device": devices, "engine": st.sampled_from(["vllm", "builtin"])},
    optional={
        "tensor_parallel_size": st.sampled_from([1, 2, 3, 4, 8, 16, 0]),
        "pipeline_parallel_size": st.sampled_from([1, 2, 3, 100]),
        "max_model_len": st.one_of(st.none(), st.just(-1), st.integers(1, 50_000), numbers),
        "max_num_seqs": st.one_of(st.integers(1, 2000), numbers),
        "max_num_batched_tokens": st.one_of(st.integers(1, 40_000), numbers),
        "gpu_memory_utilization": st.one_of(st.none(), st.floats()),
        "kv_cache_memory_bytes": st.one_of(st.none(), st.integers(0, 200 * GiB), numbers),
        "block_size": st.one_of(st.sampled_from([1, 16, 32, 128]), numbers),
        "dtype": st.sampled_from(["auto", "float32", "half", "nonsense"]),
        "kv_cache_dtype": st.sampled_from(["auto", "fp8", "nonsense"]),
        "entrypoint": st.sampled_from(["server", "llm"]),
    },
)
SMALL = ("SmolLM2-135M", "gemma-3-1b-it", "Qwen3-0.6B", "Qwen3-8B-FP8", "Mixtral-8x7B-v0.1")


def attempt(name: str, asked: dict[str, Any]) -> Plan | None:
    try:
        return make_plan(read_spec(name), PlanOptions(**asked), name=name)
    except TightfitError as e:
        assert e.message and e.hint, e  # noqa: PT017, PT018
        return None


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(SMALL), asked=options)
def test_every_plan(name: str, asked: dict[str, Any]) -> None:
    plan = attempt(name, asked)
    if plan is None:
        return
    document = plan.to_json()
    json.dumps(document, allow_nan=False)
    for rank in plan.ranks:
        assert all(component.planned_bytes >= 0 for component in rank.components)
        inside = [c.planned_bytes for c in rank.components if c.inside_budget]
        assert rank.total_bytes == sum(inside)
    kv = plan.kv_cache
    for value in (kv.available_bytes, kv.num_blocks, kv.tokens, kv.minimum_bytes):
        assert value is None or value >= 0
    verdict = plan.verdict
    assert (verdict.fits is False) == (verdict.engine_message is not None)
    longest = verdict.max_model_len_that_fits
    assert (longest is None) == (verdict.fits is None)
    if verdict.fits:
        assert longest is not None
        assert longest >= plan.options.max_model_len.value


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(SMALL), asked=options)
def test_the_longest_fits_and_one_more_does_not(name: str, asked: dict[str, Any]) -> None:
    plan = attempt(name, asked)
    longest = None if plan is None else plan.verdict.max_model_len_that_fits
    if plan is None or not longest:
        return
    # With fewer tokens than a batch, the default batch would shrink with the length.
    batch = plan.options.max_num_batched_tokens.value
    settled = asked | {
        "max_num_batched_tokens": batch,
        "max_num_seqs": plan.options.max_num_seqs.value,
    }
    fitting = attempt(name, settled | {"max_model_len": longest})
    assert fitting is not None
    assert fitting.verdict.fits
    longer = attempt(name, settled | {"max_model_len": longest + 1})
    assert longer is None or longer.verdict.fits is False


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_planned(name: str) -> None:
    spec = read_spec(name)
    length = min(4096, model_max_len(spec))
    options = PlanOptions(device=CATALOGUE["h200-141gb"], max_model_len=length)
    plan = make_plan(spec, options, name=name)
    weights = plan.ranks[0].component("weights").planned_bytes
    assert plan.verdict.fits is (weights < 0.9 * CATALOGUE["h200-141gb"].total_bytes)


def test_what_kernels_drop_after_loading_makes_no_component_negative() -> None:
    """The zero points of a symmetric GPTQ checkpoint: 4 bits of 128 weights, loaded and dropped."""
    config = read_config("Llama-3.1-70B")
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    config["quantization_config"] = {**quantized, "desc_act": False}
    rank = make_plan(model_spec(config), PlanOptions(), name="it").ranks[0]
    linear = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28_672 * 8192)
    assert rank.component("weights").detail["dropped_bytes"] == linear // 128 // 2
    assert all(component.planned_bytes >= 0 for component in rank.components)


@pytest.mark.parametrize(
    ("name", "gpu", "dtype", "engine"),
    [
        ("Qwen3-0.6B", "t4-16gb", "F16", "vllm"),
        ("Qwen3-0.6B", "rtx4090-24gb", "BF16", "vllm"),
        ("Qwen3-0.6B", "rtx4090-24gb", "BF16", "builtin"),
        ("gemma-3-1b-it", "t4-16gb", "F32", "vllm"),
        ("gemma-3-1b-it", "l4-24gb", "BF16", "vllm"),
        ("gemma-3-1b-it", "l4-24gb", "BF16", "builtin"),
    ],
)
def test_dtypes_that_a_gpu_has(name: str, gpu: str, dtype: str, engine: str) -> None:
    options = PlanOptions(engine=engine, device=CATALOGUE[gpu], max_model_len=1024)
    assert make_plan(read_spec(name), options, name=name).options.dtype.value == dtype


def test_a_dtype_that_a_gpu_has_not() -> None:
    options = PlanOptions(device=CATALOGUE["t4-16gb"], dtype="bfloat16")
    with pytest.raises(UsageError, match="bfloat16, which t4-16gb does not compute in"):
        make_plan(read_spec("Qwen3-0.6B"), options, name="x")
