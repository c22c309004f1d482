"""Models that an engine quantizes while it loads, or that `quantize` would write."""

from dataclasses import replace

import pytest

from support.configs import read_config
from support.make_quantized_data import EXPERTS, LLAMA
from support.quantized import DATA, GATE, Tensor, loaded_bytes, stored
from tightfit.errors import (
    LayoutError,
    UsageError,
)
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import check_parallel, loaded_parameters, parameters
from tightfit.model.quantization.fit import fit_quantization
from tightfit.model.quantization.online import ONLINE, SCHEMES, quantize_spec
from tightfit.planner.weights import checkpoint_bytes

_PRESETS = {
    "W8A16": "w8a16",
    "W4A16": "w4a16",
    "W4A16_ASYM": "w4a16-asym",
    "INT8": "int8",
    "FP8_DYNAMIC": "fp8-channel",
    "FP8_BLOCK": "fp8-block",
    "NVFP4A16": "nvfp4a16",
    "NVFP4": "nvfp4",
    "MXFP4": "mxfp4",
    "MXFP8": "mxfp8",
}


@pytest.mark.parametrize("preset", _PRESETS)
def test_schemes_of_quantize_are_the_presets(preset: str) -> None:
    spec = quantize_spec(model_spec(LLAMA), _PRESETS[preset])
    expected = {name: Tensor.read(line) for name, line in DATA["stored"][preset].items()}
    assert stored(spec) == expected
    assert checkpoint_bytes(spec) == sum(tensor.nbytes for tensor in expected.values())


def test_groups_that_do_not_divide() -> None:
    spec = quantize_spec(model_spec(read_config("SmolLM2-135M")), "w4a16")
    with pytest.raises(LayoutError) as e:
        parameters(spec)
    assert "self_attn.qkv_proj has 576 input features, which 128 do not divide" in e.value.message
    parameters(quantize_spec(model_spec(read_config("SmolLM2-135M")), "w4a16", group_size=64))
    with pytest.raises(LayoutError, match="blocks of 128 rows do not divide it"):
        loaded_parameters(quantize_spec(model_spec(read_config("SmolLM2-135M")), "fp8-block"))


def test_tensor_parallel_sizes_that_split_groups() -> None:
    """14336 inputs of down_proj are 112 groups of 128."""
    spec = quantize_spec(model_spec(read_config("Llama-3.1-8B")), "w4a16")
    check_parallel(spec, Parallel(tensor_parallel_size=8))
    with pytest.raises(LayoutError) as e:
        check_parallel(
            quantize_spec(model_spec(read_config("Qwen2.5-72B")), "w4a16"),
            Parallel(tensor_parallel_size=2),
        )
    # 29568 = 231 groups of 128: a well-known trap.
    assert "the 29,568 inputs of mlp.down_proj into whole blocks of 128" in e.value.message
    assert e.value.hint == "tensor parallel sizes that work: 1"


def test_blocks_of_experts_are_refined() -> None:
    """768 columns on 4 ranks are 192, and 64 divides 128 and 192: vLLM 0.32 takes such blocks."""
    spec = model_spec(read_config("Qwen3-30B-A3B-FP8"))
    parallel = Parallel(tensor_parallel_size=4)
    fitted = fit_quantization(spec, parallel)
    check_parallel(fitted, parallel)
    rank = Rank(parallel=parallel)
    scales = {
        w.name.rpartition(".")[2]: w.rank_shape(rank)
        for w in loaded_parameters(fitted)
        if w.experts and w.where == 0
    }
    assert scales["w13_weight_scale_inv"] == (128, 2 * 3, 2048 // 64)
    assert scales["w2_weight_scale_inv"] == (128, 2048 // 64, 3)
    assert fit_quantization(spec, Parallel(tensor_parallel_size=2)) is spec
    dealt = Parallel(tensor_parallel_size=4, expert_parallel=True)
    assert fit_quantization(spec, dealt) is spec
    check_parallel(spec, dealt)


def test_sums_over_ranks() -> None:
    """What all ranks hold, less copies and padding, is the checkpoint."""
    for scheme in SCHEMES:
        spec = quantize_spec(model_spec(LLAMA), scheme)
        once = {w.name: w.census(Rank()).elements for w in loaded_parameters(spec)}
        ranks = Parallel(tensor_parallel_size=2).ranks()
        for weight in loaded_parameters(spec):
            found = [weight.census(rank) for rank in ranks]
            total = sum(one.elements - one.padding - one.copies for one in found)
            assert total == once[weight.name] - weight.census(Rank()).padding, weight.name


def test_online_quantization() -> None:
    """Elements of linear layers in one byte, and a float32 scale for each of 128 fused layers."""
    plain = model_spec(read_config("Llama-3.1-8B"))
    spec = quantize_spec(plain, "fp8_per_tensor")
    assert loaded_bytes(spec) == 2 * 1_050_939_392 + 6_979_321_856 + 4 * 32 * 4
    assert checkpoint_bytes(spec) == checkpoint_bytes(plain)
    channels = quantize_spec(plain, "fp8_per_channel")
    assert loaded_bytes(channels) == 2 * 1_050_939_392 + 6_979_321_856 + 4 * 32 * 43_008
    blocks = quantize_spec(plain, "fp8_per_block")
    assert loaded_bytes(blocks) == 2 * 1_050_939_392 + 6_979_321_856 * (1 + 4 / 128**2)
    experts = quantize_spec(plain, "experts_int8")
    assert loaded_bytes(experts) == loaded_bytes(plain)
    moe = model_spec(EXPERTS)
    saved = loaded_bytes(moe) - loaded_bytes(quantize_spec(moe, "int8_per_channel_weight_only"))
    assert saved == 4 * (3 * 256 * 256 - 4 * (2 * 256 + 256))


def test_online_blocks_are_made_after_cutting() -> None:
    parallel = Parallel(tensor_parallel_size=8)
    spec = quantize_spec(model_spec(read_config("Qwen3-30B-A3B")), "fp8_per_block")
    check_parallel(spec, parallel)
    held = {w.name: w.rank_shape(Rank(parallel=parallel)) for w in loaded_parameters(spec)}
    # A rank's 96 columns of 768 are rounded up to 128.
    assert held["model.layers.0.mlp.experts.w2_weight"] == (128, 2048, 128)
    assert held["model.layers.0.mlp.experts.w2_weight_scale_inv"] == (128, 16, 1)


def test_what_stays_unquantized() -> None:
    for scheme in (*ONLINE, *SCHEMES):
        if scheme == "fp8-tensor":
            # vLLM has no such experts.
            continue
        spec = quantize_spec(model_spec(EXPERTS), scheme)
        dtypes = {w.name: w.held_dtype(spec.dtype) for w in loaded_parameters(spec)}
        kept = (
            "model.embed_tokens.weight",
            "lm_head.weight",
            f"{GATE}weight",
            "model.norm.weight",
        )
        assert {dtypes[name] for name in kept} == {"BF16"}
        assert set(dtypes.values()) != {"BF16"}


def test_quantizing_what_is_quantized() -> None:
    spec = model_spec(read_config("Qwen3-8B-FP8"))
    assert quantize_spec(spec, "fp8") is spec
    with pytest.raises(UsageError) as e:
        quantize_spec(spec, "w4a16")
    assert "is quantized already: fp8 (block 128x128)" in e.value.message
    plain = replace(spec, quantization=None)
    with pytest.raises(UsageError, match="unknown --quantization 'int3'"):
        quantize_spec(plain, "int3")
    with pytest.raises(UsageError, match="a group size of 64"):
        quantize_spec(plain, "fp8-channel", group_size=64)
