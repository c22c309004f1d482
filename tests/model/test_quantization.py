"""Quantized checkpoints, held against what compressed-tensors writes and vLLM makes room for."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.configs import read_config
from support.make_quantized_data import EXPERTS, LLAMA
from support.quantized import DATA, GATE, Tensor, groups, llama, llama_8b, loaded_bytes, stored
from tightfit.errors import (
    CheckpointError,
    ConfigError,
    TightfitError,
    UnsupportedModelError,
)
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import loaded_parameters
from tightfit.model.quantization.recipe import Recipe
from tightfit.model.sources import check_sources, source_shapes
from tightfit.planner.weights import checkpoint_bytes


@pytest.mark.parametrize("preset", DATA["stored"])
def test_stored_as_compressed_tensors_writes_it(preset: str) -> None:
    found = stored(llama(DATA["sections"][preset]))
    assert found == {name: Tensor.read(line) for name, line in DATA["stored"][preset].items()}


@pytest.mark.parametrize("case", DATA["held"])
def test_loaded_as_vllm_makes_room_for_it(case: str) -> None:
    """Names, dtypes and elements on rank 0 of 2; vLLM keeps some shapes transposed."""
    name, _, model = case.rpartition(", ")
    base = LLAMA if model == "dense" else EXPERTS
    section = json.loads(json.dumps(DATA["sections"][name]))
    if "config_groups" in section:
        section["ignore"].append(GATE.strip("."))
    spec = model_spec({**base, "quantization_config": section})
    rank = Rank(parallel=Parallel(tensor_parallel_size=2))
    ours = {
        weight.name: (weight.held_dtype(spec.dtype), weight.census(rank).elements)
        for weight in loaded_parameters(spec)
        if ".layers." in weight.name and "norm" not in weight.name and GATE not in weight.name
    }
    theirs = {}
    for key, line in DATA["held"][case].items():
        tensor = Tensor.read(line)
        key = key.replace(".experts.routed_experts.", ".experts.").replace(
            ".experts.gate.", ".gate."
        )
        # AWQ has no way to name a router alone.
        if GATE not in f"{key}.":
            theirs[key] = tensor.dtype, tensor.elements
    assert ours == theirs


def test_known_totals() -> None:
    """Llama 3.1 8B has 6,979,321,856 elements in linear layers and 1,050,939,392 elsewhere."""
    packed, others = 6_979_321_856, 2 * 1_050_939_392
    gptq = llama_8b(quant_method="gptq", bits=4, group_size=128, sym=True, desc_act=False)
    awq = llama_8b(quant_method="awq", bits=4, group_size=128, zero_point=True, version="gemm")
    scales, zeros = packed // 128 * 2, packed // 128 // 2
    assert loaded_bytes(gptq) == loaded_bytes(awq) == others + packed // 2 + scales + zeros
    assert loaded_bytes(gptq) == 5_727_854_592
    assert loaded_bytes(gptq, settled=True) == 5_727_854_592 - zeros
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    w4a16 = llama_8b(**groups(four, format="pack-quantized"))
    # A shape of 16 bytes for each of 4 fused layers, 3 scales and 3 zero points of a cache.
    assert loaded_bytes(w4a16) == others + packed // 2 + scales + 32 * (4 * 16 + 3 * 4 + 3 * 2)
    assert loaded_bytes(w4a16) == 5_700_594_240
    eight = {"num_bits": 8, "type": "int", "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    int8 = llama_8b(**groups(eight, inputs, format="int-quantized"))
    assert loaded_bytes(int8) == 9_086_706_240


def test_checkpoints_as_published() -> None:
    deepseek = model_spec(read_config("DeepSeek-V3"))
    # Meta-device models leave out 58 biases of 256 routers, which are float32 in the files.
    assert checkpoint_bytes(deepseek) == 673_150_552_416 + 58 * 256 * 4
    values = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "quantization_config": {"quant_method": "mxfp4"},
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "vocab_size": 201_088,
        "sliding_window": 128,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "rope_theta": 150_000,
    }
    gpt_oss = model_spec(values)
    assert checkpoint_bytes(gpt_oss) == 65_248_815_744
    shapes = source_shapes(gpt_oss)
    experts = "model.layers.0.mlp.experts"
    assert shapes[f"{experts}.gate_up_proj_blocks"] == (128, 5760, 90, 16)
    assert shapes[f"{experts}.gate_up_proj_scales"] == (128, 5760, 90)
    assert shapes[f"{experts}.down_proj_blocks"] == (128, 2880, 90, 16)


def test_mxfp4_experts_are_padded_per_rank() -> None:
    """2880 columns are 45 times 64, and 8 ranks get 6 of those each; vLLM rounds 360 up to 384."""
    values = {
        **EXPERTS,
        "hidden_size": 2880,
        "moe_intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    spec = model_spec(values)
    assert isinstance(spec.quantization, Recipe)
    rank = Rank(tp_rank=7, parallel=Parallel(tensor_parallel_size=8))
    held = {w.name.rpartition(".")[2]: w for w in loaded_parameters(spec) if w.experts}
    assert held["w13_weight"].rank_shape(rank) == (4, 2 * 384, 1440)
    assert held["w2_weight"].rank_shape(rank) == (4, 2880, 192)
    assert held["w2_weight_scale"].rank_shape(rank) == (4, 2880, 12)
    # The last of 8 ranks has 2880 - 7 * 384 = 192 columns, and as many zeros.
    assert held["w2_weight"].census(rank).padding == 4 * 2880 * 96


@pytest.mark.parametrize(
    ("algorithm", "dtype"), [("FP8", "F8_E4M3"), ("NVFP4", "U8"), ("MXFP8", "F8_E4M3")]
)
def test_modelopt_in_both_spellings(algorithm: str, dtype: str) -> None:
    """`hf_quant_config.json` nests what config.json has flat, under other names."""
    nested = {
        "quant_method": "modelopt",
        "producer": {"name": "modelopt"},
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head", "model.layers.0.self_attn*"],
        },
    }
    flat = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "ignore": ["lm_head", "model.layers.0.self_attn*"],
    }
    assert stored(llama(nested)) == stored(llama(flat))
    assert llama(nested).kv_cache_quantization == llama(flat).kv_cache_quantization == "fp8_e4m3"
    found = stored(llama(nested))
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == dtype
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == "BF16"


def test_modelopt_of_mixed_precision() -> None:
    section = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "model.layers.0.mlp.down_proj": {"quant_algo": "FP8"},
            "model.layers.0.mlp.gate_proj": {"quant_algo": "NVFP4", "group_size": 16},
            "model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
        },
    }
    found = stored(llama(section))
    assert found["model.layers.0.mlp.down_proj.weight"].dtype == "F8_E4M3"
    assert found["model.layers.0.mlp.up_proj.weight_scale_2"].dtype == "F32"
    assert found["model.layers.0.self_attn.o_proj.weight"].dtype == "BF16"


def test_gptq_with_exceptions() -> None:
    section = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": False,
        "desc_act": True,
        "dynamic": {r"-:.*self_attn.*": {}, r"+:.*down_proj": {"bits": 8, "group_size": -1}},
    }
    spec = llama(section)
    shapes = source_shapes(spec)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (512, 256)
    assert shapes["model.layers.0.mlp.up_proj.qweight"] == (32, 512)
    assert shapes["model.layers.0.mlp.up_proj.qzeros"] == (4, 64)
    assert shapes["model.layers.0.mlp.down_proj.qweight"] == (128, 256)
    assert shapes["model.layers.0.mlp.down_proj.scales"] == (1, 256)
    assert spec.quantization is not None
    assert "desc_act" in (spec.quantization.refusal((0, 32)) or "")
    assert spec.quantization.refusal((0, 25)) is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' is not modelled"),
        ({"quant_method": "hqq"}, "'hqq' is not modelled"),
        ({"quant_method": "gptq", "bits": 3}, "weights of 3 bits are not modelled"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin' is not modelled"),
        ({"quant_method": "awq", "version": "gemv"}, "'gemv' is not modelled"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ' is not modelled"),
        (groups({"num_bits": 4}, format="marlin-24"), "'marlin-24' of compressed-tensors"),
        (groups({"num_bits": 6, "type": "float"}, format="float-quantized"), "weights of 6 bits"),
        (
            groups({}, format="dense", kv_cache_scheme={"num_bits": 4, "type": "int"}),
            "not symmetric fp8",
        ),
    ],
)
def test_honest_refusals(section: object, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        llama(section)


@pytest.mark.parametrize(
    "section",
    [
        groups({}, config_groups=[1]),
        groups({"num_bits": "4"}, format="pack-quantized"),
        groups({}, config_groups={"a": {"targets": 3}}),
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        {"quant_method": "fp8", "activation_scheme": "sometimes"},
        {"quant_method": "gptq", "bits": 4, "group_size": -2},
    ],
)
def test_malformed_sections(section: object) -> None:
    with pytest.raises(ConfigError):
        llama(section)


def test_headers_of_quantized_checkpoints() -> None:
    """Scalars may be `[]`, scales of rows `[n]`; what is not quantized has to be a float."""
    spec = llama(DATA["sections"]["FP8"])
    tensors = stored(spec)
    scalar = "model.layers.0.self_attn.q_proj.weight_scale"
    check_sources(spec, {**tensors, scalar: Tensor(dtype="F32", shape=())}, "here")
    cache = {"model.layers.0.self_attn.k_scale": Tensor(dtype="F32", shape=(1,))}
    check_sources(spec, {**tensors, **cache}, "here")
    weight = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(CheckpointError) as e:
        check_sources(spec, {**tensors, weight: Tensor(dtype="I8", shape=(256, 512))}, "here")
    assert "has the dtype I8, and the quantization_config means F8_E4M3" in e.value.message
    norm = "model.norm.weight"
    with pytest.raises(CheckpointError, match="means BF16 or F16 or F32"):
        check_sources(spec, {**tensors, norm: Tensor(dtype="U8", shape=(256,))}, "here")


def test_g_idx_may_be_missing() -> None:
    spec = llama({"quant_method": "gptq", "bits": 4, "group_size": 128})
    tensors = stored(spec)
    assert tensors["model.layers.0.mlp.up_proj.g_idx"].shape == (1, 256)
    check_sources(spec, {k: v for k, v in tensors.items() if not k.endswith("g_idx")}, "here")
    bias = {"model.layers.0.mlp.up_proj.bias": Tensor(dtype="F16", shape=(512,))}
    check_sources(spec, {**tensors, **bias}, "here")


_WORDS = [
    "int",
    "float",
    "group",
    "channel",
    "FP8",
    "NVFP4",
    "MIXED_PRECISION",
    "Linear",
    "re:(",
    "pack-quantized",
    "gemm",
    "fp8",
    "float-quantized",
    "int-quantized",
    "lm_head",
]
_INNER = [
    "weights",
    "input_activations",
    "targets",
    "num_bits",
    "type",
    "strategy",
    "group_size",
    "quant_algo",
    "symmetric",
    "bits",
    "a",
    "quantized_layers",
]
_METHODS = [
    "fp8",
    "fbgemm_fp8",
    "gptq",
    "awq",
    "auto-round",
    "modelopt",
    "mxfp4",
    "mxfp8",
    "compressed-tensors",
]
_KEYS = [
    "config_groups",
    "ignore",
    "format",
    "kv_cache_scheme",
    "bits",
    "group_size",
    "sym",
    "dynamic",
    "desc_act",
    "lm_head",
    "weight_block_size",
    "activation_scheme",
    "quant_algo",
    "quantization",
    "quantized_layers",
    "zero_point",
    "modules_to_not_convert",
    "exclude_modules",
    "packing_format",
    "sparsity_config",
]
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.floats(allow_nan=True),
    st.sampled_from([*_WORDS, ""]),
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(_INNER), inner, max_size=5),
    ),
    max_leaves=8,
)
_SECTIONS = st.fixed_dictionaries(
    {"quant_method": st.sampled_from([*_METHODS, 3, None])},
    optional=dict.fromkeys(_KEYS, _VALUES),
)


@settings(max_examples=200, deadline=None)
@given(section=_SECTIONS)
def test_any_section_is_read_or_refused(section: dict[str, object]) -> None:
    try:
        spec = llama(section)
        sizes = checkpoint_bytes(spec), loaded_bytes(spec)
    except TightfitError:
        return
    assert min(sizes) > 0
