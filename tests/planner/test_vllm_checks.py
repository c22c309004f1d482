"""What vLLM refuses at its start, and a plan therefore too."""

from typing import Any

import pytest

from support.configs import read_config, read_spec
from tightfit.errors import LayoutError, TightfitError, UnsupportedModelError, UsageError
from tightfit.model.families import model_spec
from tightfit.planner.advice import advise
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import CATALOGUE, named
from tightfit.planner.fit import fit
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan


def plan(name: str, gpu: str | None = "h100-80gb", **options: Any) -> Plan:
    device = None if gpu is None else named(gpu)
    return make_plan(read_spec(name), PlanOptions(device=device, **options), name=name)


@pytest.mark.parametrize(
    ("name", "gpu", "options", "words"),
    [
        ("gpt-oss-20b", "t4", {}, "mxfp4 needs compute capability 8.0"),
        ("Qwen3-8B-FP8", "v100-32gb", {}, "needs compute capability 7.5"),
        ("Qwen3-8B", "v100-32gb", {"quantization": "fp8"}, "fp8 needs compute capability 7.5"),
        ("Qwen3-8B", "v100-32gb", {"quantization": "nvfp4"}, "needs compute capability 7.5"),
        ("DeepSeek-V3.2", "a100-80gb", {"tensor_parallel_size": 16}, "no kernel on a100-80gb"),
        ("DeepSeek-V4-Flash", "a100-80gb", {"tensor_parallel_size": 8}, "no kernel"),
    ],
)  # fmt: skip
def test_devices_without_kernels(name: str, gpu: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        plan(name, gpu, **options)
    assert caught.value.hint is not None
    assert "such as" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "gpu"),
    [("gpt-oss-20b", "a30"), ("Qwen3-8B-FP8", "t4"), ("DeepSeek-V3", "a100-80gb")],
)
def test_devices_with_kernels(name: str, gpu: str) -> None:
    plan(name, gpu)


def test_fp8_of_modelopt_came_to_ampere() -> None:
    section = {"quant_method": "modelopt", "quant_algo": "FP8"}
    spec = model_spec(read_config("Qwen3-8B") | {"quantization_config": section})
    old, new = (
        PlanOptions(device=CATALOGUE["a100-80gb"], engine_version=v) for v in ("0.25.1", "0.32.0")
    )
    make_plan(spec, new, name="x")
    with pytest.raises(UsageError, match=r"needs compute capability 8\.9"):
        make_plan(spec, old, name="x")


def test_nothing_is_proposed_that_does_not_run() -> None:
    spec = read_spec("Qwen3-8B")

    def replan(options: PlanOptions) -> Plan:
        return make_plan(spec, options, name="x")

    options = PlanOptions(device=CATALOGUE["v100-16gb"], max_model_len=8192)
    changes = {one.change for one in advise(replan(options), options, replan)}
    assert not changes & {"--quantization fp8", "--quantization nvfp4", "--quantization w4a16"}
    oss = read_spec("gpt-oss-20b")
    fitted = fit(PlanOptions(), lambda options: make_plan(oss, options, name="x"))
    assert all((one.device.capability or (9, 0)) >= (8, 0) for one in fitted.candidates)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gemma-2-9b", {"dtype": "float16"}, "overflows in gemma2"),
        ("gemma-3-4b-it", {"dtype": "half"}, "overflows in gemma3"),
        ("Qwen3-8B", {"enable_expert_parallel": True}, "has no experts"),
        ("Qwen3-8B", {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192},
         "less than the context of 40960"),
        ("Qwen3-8B", {"enable_lora": True, "max_lora_rank": 17}, "--max-lora-rank 17"),
        ("Qwen3-8B", {"enable_lora": True, "max_loras": 4, "max_cpu_loras": 2},
         "less than --max-loras 4"),
        ("Qwen3-8B", {"kv_cache_dtype": "float32"}, "does not know"),
        ("Qwen3-8B", {"kv_cache_dtype": "fp8_ds_mla"}, "does not attend sparsely"),
        ("DeepSeek-V3", {"kv_cache_dtype": "fp8_ds_mla"}, "does not attend sparsely"),
        ("Qwen3-8B", {"optimization_level": 4}, "-O 4 is out of range"),
        ("Qwen3-8B", {"compilation_config": {"mode": 9}}, "the mode 9"),
        ("Qwen3-8B", {"compilation_config": {"foo": 1}}, "'foo', which vLLM does not know"),
        ("Qwen3-8B", {"load_format": "foo"}, "unknown --load-format 'foo'"),
        ("Qwen3-8B", {"load_format": "bitsandbytes"}, "unknown --load-format"),
        ("Qwen3-8B", {"quantization": "awq_marlin"}, "config.json has no quantization_config"),
        ("Qwen3-8B", {"quantization": "compressed-tensors"}, "has no quantization_config"),
        ("Qwen3-8B", {"quantization": "modelopt_fp4"}, "has no quantization_config"),
    ],
)  # fmt: skip
def test_options_that_vllm_refuses(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gemma-2-9b", {"dtype": "float32"}),
        ("Qwen3-30B-A3B", {"enable_expert_parallel": True, "tensor_parallel_size": 2}),
        ("Qwen3-8B", {"enable_chunked_prefill": False}),
        ("Qwen3-8B", {"enable_lora": True, "max_lora_rank": 320, "max_cpu_loras": 2}),
        ("DeepSeek-V3.2", {"kv_cache_dtype": "fp8_ds_mla", "tensor_parallel_size": 8}),
        ("Qwen3-8B", {"compilation_config": {"cudagraph_mode": "NONE", "pass_config": {}}}),
        ("Qwen3-8B", {"load_format": "runai_streamer"}),
    ],
)
def test_options_that_it_takes(name: str, options: dict[str, Any]) -> None:
    plan(name, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "turboquant_k8v4"},
        {"kv_cache_dtype": "nvfp4_ds_mla"},
        {"load_format": "bitsandbytes", "engine_version": "0.25.1"},
    ],
)
def test_what_vllm_has_and_a_plan_has_not(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="is not modelled"):
        plan("Qwen3-8B", **options)


def test_a_length_on_trial_refuses_nothing() -> None:
    options = {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192}
    result = plan("Qwen3-8B", max_model_len=8192, **options)
    assert (result.verdict.max_model_len_that_fits or 0) > 8192
    with pytest.raises(TightfitError):
        plan("Qwen3-8B", max_model_len=-1, **options)


@pytest.mark.parametrize("ranks", [4, 8])
def test_fused_matrices_are_cut_within_blocks_of_scales(ranks: int) -> None:
    result = plan("MiMo-V2-Flash", "h200-141gb", tensor_parallel_size=ranks)
    assert result.verdict.fits
    with pytest.raises(LayoutError, match=r"self_attn\.qkv_proj"):
        plan("MiMo-V2-Flash", None, tensor_parallel_size=ranks, engine_version="0.12.0")


def test_the_layer_that_cannot_be_cut_is_named() -> None:
    with pytest.raises(LayoutError, match=r"mlp\.down_proj") as caught:
        plan("DeepSeek-V3.2", None, tensor_parallel_size=32)
    assert caught.value.hint == "tensor parallel sizes that work: 1, 2, 4, 8, 16"
