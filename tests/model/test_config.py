"""Broken configs: every one gets a line that names the key and the value."""

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.configs import ONE_PER_ARCHITECTURE, read_config
from tightfit.errors import ConfigError, TightfitError, UnsupportedModelError
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel
from tightfit.model.parameters import check_parallel, parameters
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import CATALOGUE
from tightfit.planner.options import PlanOptions

LLAMA = read_config("Llama-3.1-8B")
CORRECT = "correct the config.json, or download it again"


def error(base: dict[str, Any], **changes: Any) -> TightfitError:
    values = {key: value for key, value in (base | changes).items() if value is not ...}
    with pytest.raises(TightfitError) as e:
        model_spec(values)
    return e.value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "config.json lacks 'hidden_size'"),
        ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
        ({"num_hidden_layers": ...}, "config.json lacks 'num_hidden_layers'"),
        ({"num_attention_heads": ...}, "config.json lacks 'num_attention_heads'"),
        ({"intermediate_size": ...}, "config.json lacks 'intermediate_size'"),
        ({"vocab_size": ...}, "config.json lacks 'vocab_size'"),
        ({"architectures": ...}, "config.json lacks 'architectures'"),
        ({"architectures": []}, "config.json lacks 'architectures'"),
    ],
)
def test_missing(changes: dict[str, Any], message: str) -> None:
    found = error(LLAMA, **changes)
    assert isinstance(found, ConfigError)
    assert found.message == message
    assert found.hint == "is this the config.json of a complete Hugging Face checkpoint?"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_size": "big"}, "hidden_size = 'big', which should be a whole number"),
        ({"hidden_size": 4096.5}, "hidden_size = 4096.5, which should be a whole number"),
        ({"hidden_size": True}, "hidden_size = True, which should be a whole number"),
        ({"hidden_size": [4096]}, "hidden_size = [4096], which should be a whole number"),
        ({"hidden_size": math.inf}, "hidden_size = inf, which should be a whole number"),
        ({"vocab_size": math.nan}, "vocab_size = nan, which should be a whole number"),
        ({"vocab_size": 0}, "vocab_size = 0, which should be at least 1 and of a possible size"),
        ({"vocab_size": -5}, "vocab_size = -5, which should be at least 1 and of a possible size"),
        (
            {"vocab_size": 2**70},
            f"vocab_size = {2**70}, which should be at least 1 and of a possible size",
        ),
        ({"num_hidden_layers": 20_000}, "num_hidden_layers = 20000, more than any model has"),
        ({"rope_theta": "x"}, "rope_theta = 'x', which should be a finite number"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0, which should be above zero"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor = 0.0, which should be above zero"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor = 2.0, which is more than the whole"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps = nan, which should be a finite number"),
        ({"rms_norm_eps": 10**400}, f"rms_norm_eps = {'1' + '0' * 59}, which should be a finite "),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no', which should be true or "),
        ({"attention_bias": 1}, "attention_bias = 1, which should be true or false"),
        ({"architectures": "Llama"}, "architectures = 'Llama', which should be a list of strings"),
        ({"architectures": [1]}, "architectures = [1], which should be a list of strings"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn', which should be an object"),
        ({"torch_dtype": "int3"}, "torch_dtype = 'int3', which should be one of float32, float, "),
        ({"torch_dtype": 16}, "torch_dtype = 16, which should be a string"),
        ({"hidden_act": 3}, "hidden_act = 3, which should be a string"),
        (
            {"num_attention_heads": 32, "num_key_value_heads": 12},
            "num_attention_heads = 32, which is not a multiple of num_key_value_heads = 12",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 8},
            "num_attention_heads = 4, which is not a multiple of num_key_value_heads = 8",
        ),
    ],
)
def test_wrong(changes: dict[str, Any], complaint: str) -> None:
    found = error(LLAMA, **changes)
    assert isinstance(found, ConfigError)
    assert found.message.startswith(f"config.json has {complaint}")
    assert found.hint is not None
    assert found.hint.startswith("correct the config.json")
    assert "\n" not in found.message


def test_nested_objects_are_named() -> None:
    found = error(LLAMA, rope_scaling={"rope_type": 7})
    assert found.message == (
        "config.json: rope_scaling has rope_type = 7, which should be a string"
    )


@pytest.mark.parametrize(
    ("scaling", "complaint"),
    [
        ({"rope_type": "linear"}, "lacks 'factor'"),
        (
            {"rope_type": "dynamic", "factor": "x"},
            "has factor = 'x', which should be a finite number",
        ),
        ({"rope_type": "yarn", "factor": 0.0}, "has factor = 0.0, which should be above zero"),
        ({"rope_type": "llama3", "factor": 8.0}, "lacks 'low_freq_factor'"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "lacks 'long_factor'"),
        (
            {"rope_type": "su", "short_factor": [1.0], "long_factor": ["x"]},
            "has long_factor = ['x'], which should be a list of finite numbers",
        ),
        (
            {"rope_type": "longrope", "short_factor": 2.0, "long_factor": [1.0]},
            "has short_factor = 2.0, which should be a list of numbers",
        ),
    ],
)
def test_rope_factors(scaling: dict[str, Any], complaint: str) -> None:
    found = error(LLAMA, rope_scaling=scaling)
    assert found.message == f"config.json: rope_scaling {complaint}"


def test_gemma_scale_comes_from_a_positive_number() -> None:
    found = error(read_config("gemma-2-2b-it"), query_pre_attn_scalar=0)
    assert found.message == (
        "config.json has query_pre_attn_scalar = 0.0, which should be above zero"
    )


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Mixtral-8x7B-v0.1"])
def test_experts_are_bounded(name: str) -> None:
    key = "num_experts" if name.startswith("Qwen") else "num_local_experts"
    found = error(read_config(name), **{key: 2**30})
    assert found.message.startswith(f"config.json has {key} = {2**30}, which should be at least 1")


def test_layer_types() -> None:
    gemma = read_config("gemma-3-1b-it")
    found = error(gemma, layer_types=["full_attention"] * 3)
    assert found.message == "config.json has 3 layer_types for num_hidden_layers = 26"
    found = error(gemma, layer_types=["full_attention"] * 25 + ["mamba"])
    assert isinstance(found, UnsupportedModelError)
    assert found.message == "layer type 'mamba' is not modelled"


def test_rope_type() -> None:
    found = error(LLAMA, rope_scaling={"rope_type": "spiral", "factor": 2.0})
    assert isinstance(found, UnsupportedModelError)
    assert found.message == "rope_type 'spiral' is not modelled"
    assert found.hint == "known: default, linear, dynamic, llama3, yarn, longrope, su"


def test_unknown_architecture() -> None:
    found = error(LLAMA, architectures=["LlamoForCausalLM"])
    assert isinstance(found, UnsupportedModelError)
    assert found.message == "architecture LlamoForCausalLM is not modelled"
    assert found.hint is not None
    assert found.hint.startswith("close names that are: LlamaForCausalLM")
    assert found.exit_code == 3


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "quark"},
            "quantization_config with quant_method 'quark' is not modelled",
        ),
        ({}, "quantization_config with quant_method 'unnamed' is not modelled"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            "quantization_config has weight_block_size = [128], not two sizes",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [0, 128]},
            "quantization_config has weight_block_size = [0, 128], not two sizes",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [1.5, 128]},
            "config.json: quantization_config has weight_block_size = [1.5, 128], which should be "
            "a list of whole numbers",
        ),
        ([1], "config.json has quantization_config = [1], which should be an object"),
    ],
)
def test_quantization(quantization: object, message: str) -> None:
    assert error(LLAMA, quantization_config=quantization).message == message


def test_old_and_new_spellings_mean_the_same() -> None:
    old = read_config("Llama-3.1-8B")
    new = {k: v for k, v in old.items() if k not in ("torch_dtype", "rope_theta", "rope_scaling")}
    new["dtype"] = old["torch_dtype"]
    new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    assert asdict(model_spec(new)) == asdict(model_spec(old))


junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.sampled_from([0, 1, -1, 2, 3, 7, 64, 2**31, 2**40, 2**63]),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["yarn", "linear", "dynamic", "longrope", "fp8", "sliding_attention"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["rope_type", "factor", "rope_theta", "quant_method", "a"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=4,
)
BASES = (*ONE_PER_ARCHITECTURE, "Qwen3-30B-A3B-FP8", "Phi-4-mini-instruct")
EXTRA_KEYS = (
    "head_dim", "rope_parameters", "rope_scaling", "layer_types", "sliding_window",
    "sliding_window_pattern", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "partial_rotary_factor", "mlp_only_layers", "decoder_sparse_step",
    "use_sliding_window", "max_window_layers", "attention_multiplier", "logits_scaling",
    "embedding_multiplier", "num_local_experts", "num_experts", "quantization_config",
    "original_max_position_embeddings", "max_position_embeddings", "rope_local_base_freq",
)  # fmt: skip


@st.composite
def broken_configs(draw: st.DrawFn) -> dict[str, Any]:
    config = read_config(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted({*config, *EXTRA_KEYS} - {"architectures"})))
        nested = config.get(key)
        if isinstance(nested, dict) and nested and draw(st.booleans()):
            config[key] = nested | {draw(st.sampled_from(sorted(nested))): draw(junk)}
        elif draw(st.booleans()):
            config[key] = draw(junk)
        else:
            config.pop(key, None)
    return config


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    config=broken_configs(),
    size=st.sampled_from([1, 2, 3]),
    engine=st.sampled_from(["vllm", "builtin"]),
)
def test_no_config_gives_a_traceback(config: dict[str, Any], size: int, engine: str) -> None:
    try:
        spec = model_spec(config)
        parameters(spec)
        check_parallel(spec, Parallel(tensor_parallel_size=size, uneven=engine == "builtin"))
        options = PlanOptions(
            engine=engine, device=CATALOGUE["h100-80gb"], tensor_parallel_size=size
        )
        plan = make_plan(spec, options, name="it")
    except TightfitError as e:
        complaint = e.message
    else:
        json.dumps(plan.to_json(), allow_nan=False)
        assert all(c.planned_bytes >= 0 for rank in plan.ranks for c in rank.components)
        return
    assert complaint
    assert "\n" not in complaint
