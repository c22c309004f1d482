"""Mixtures of experts and hybrids: caches by vLLM's formulas, and what is special about each."""

from typing import Any

import pytest

from support.configs import read_config, read_spec
from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.mlp import MoE
from tightfit.model.cache import CacheKind, TokenCache
from tightfit.model.config import Config
from tightfit.model.families import model_spec, text_spec
from tightfit.model.layout import Parallel, Rank, on_rank
from tightfit.model.parameters import check_parallel, parameters
from tightfit.model.spec import ModelSpec, ropes


def rank(size: int, *, expert_parallel: bool = False) -> Rank:
    return Parallel(tensor_parallel_size=size, expert_parallel=expert_parallel).ranks()[0]


def caches(spec: ModelSpec, size: int) -> list[TokenCache]:
    found = [c for layer in spec.layers for m in layer.mixers for c in m.caches(rank(size))]
    assert all(isinstance(cache, TokenCache) for cache in found)
    return [cache for cache in found if isinstance(cache, TokenCache)]


def changed(name: str, **changes: Any) -> ModelSpec:
    return model_spec({**read_config(name), **changes})


def test_gpt_oss_slides_every_other_layer() -> None:
    kept = caches(read_spec("gpt-oss-20b-BF16"), 2)
    assert [cache.window for cache in kept] == [128, None] * 12
    assert {cache.elements_per_token for cache in kept} == {8 // 2 * 2 * 64}


def test_gpt_oss_rotates_with_a_float32_table() -> None:
    (rope,) = ropes(read_spec("gpt-oss-20b-BF16").layers)
    assert (rope.dtype, rope.rotary_dim) == ("F32", 64)


def test_gpt_oss_experts_have_biases() -> None:
    """w2_bias is whole on every rank: vLLM adds it on the first."""
    spec = read_spec("gpt-oss-20b-BF16")
    shapes = {w.name: w.rank_shape(rank(4)) for w in parameters(spec) if ".3.mlp" in w.name}
    module = "model.layers.3.mlp.experts"
    assert shapes[f"{module}.w13_weight"] == (32, 2 * 2880 // 4, 2880)
    assert shapes[f"{module}.w13_bias"] == (32, 2 * 2880 // 4)
    assert shapes[f"{module}.w2_weight"] == (32, 2880, 2880 // 4)
    assert shapes[f"{module}.w2_bias"] == (32, 2880)


def test_llama4_sees_chunks_but_in_every_fourth_layer() -> None:
    spec = read_spec("Llama-4-Scout-17B-16E-text")
    kept = caches(spec, 1)
    assert [cache.chunk for cache in kept] == [8192, 8192, 8192, None] * 12
    assert {cache.elements_per_token for cache in kept} == {8 * 2 * 128}
    mixers = [layer.mixers[0] for layer in spec.layers]
    assert [isinstance(m, Attention) and m.rope is None for m in mixers[:4]] == [
        False, False, False, True,
    ]  # fmt: skip


def test_maverick_has_experts_in_every_other_layer() -> None:
    spec = read_spec("Llama-4-Maverick-17B-128E-text")
    assert [isinstance(layer.mlp, MoE) for layer in spec.layers] == [False, True] * 24


def test_llama4_without_chunks() -> None:
    spec = changed("Llama-4-Scout-17B-16E-text", attention_chunk_size=None)
    assert {cache.chunk for cache in caches(spec, 1)} == {None}


def test_mimo_has_heads_of_two_kinds() -> None:
    """9 full layers of 4 heads and 39 sliding ones of 8, keys of 192 and values of 128."""
    spec = read_spec("MiMo-V2-Flash")
    full = [cache for cache in caches(spec, 4) if cache.window is None]
    sliding = [cache for cache in caches(spec, 4) if cache.window == 128]
    assert (len(full), len(sliding)) == (9, 39)
    assert {cache.elements_per_token for cache in full} == {1 * (192 + 128)}
    assert {cache.elements_per_token for cache in sliding} == {2 * (192 + 128)}


def test_a_rank_of_minimax_has_the_norms_of_its_heads() -> None:
    """vLLM's RMSNorm of all heads is dealt, so more ranks than KV heads are possible."""
    spec = changed("MiniMax-M2.5", quantization_config=None)
    shapes = {w.name.rsplit("self_attn.", 1)[-1]: w.rank_shape(rank(16)) for w in parameters(spec)}
    assert shapes["q_norm.weight"] == (48 * 128 // 16,)
    assert shapes["k_norm.weight"] == (128,)
    check_parallel(spec, Parallel(tensor_parallel_size=16))


@pytest.mark.parametrize("name", ["GLM-4.7-FP8", "ERNIE-4.5-21B-A3B-PT", "MiMo-V2-Flash"])
def test_routers_in_float32(name: str) -> None:
    routers = [
        w for w in parameters(changed(name, quantization_config=None)) if ".gate.we" in w.name
    ]
    assert routers
    assert {w.dtype for w in routers} == {"F32"}


def test_experts_are_dealt_whole_but_the_shared_one_is_cut() -> None:
    spec = changed("DeepSeek-V3", quantization_config=None)
    where = rank(8, expert_parallel=True)
    held = [w for w in parameters(spec) if on_rank(w, where, spec.num_layers)]
    shapes = {w.name: w.rank_shape(where) for w in held}
    module = "model.layers.60.mlp"
    assert shapes[f"{module}.experts.w13_weight"] == (256 // 8, 2 * 2048, 7168)
    assert shapes[f"{module}.shared_experts.down_proj.weight"] == (7168, 2048 // 8)
    assert shapes[f"{module}.gate.weight"] == (256, 7168)


def test_the_text_part_of_a_multimodal_model() -> None:
    config = read_config("Kimi-K2-Thinking")
    outer = {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": config}
    spec = text_spec(Config(outer), "DeepseekV3ForCausalLM")
    assert spec.architecture == "KimiK25ForConditionalGeneration"
    assert spec.num_layers == 61


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "Qwen1.5-MoE-A2.7B",
            {"use_sliding_window": True, "sliding_window": 4096},
            "a sliding window (use_sliding_window, 4096) in Qwen2MoeForCausalLM is not modelled",
        ),
        (
            "Llama-4-Scout-17B-16E-text",
            {"moe_layers": [1, 3]},
            "config.json has moe_layers that differ from interleave_moe_layer_step, "
            "which is not modelled",
        ),
        (
            "MiMo-V2-Flash",
            {"n_shared_experts": 1},
            "a shared expert in MiMoV2FlashForCausalLM is not modelled",
        ),
        ("OLMoE-1B-7B-0924", {"clip_qkv": 8.0}, "clip_qkv in OlmoeForCausalLM is not modelled"),
    ],
)
def test_flags_that_are_not_modelled(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError) as e:
        changed(name, **changes)
    assert e.value.message == message


def test_minimax_m3_indexes_all_but_its_first_layers() -> None:
    """Four KV heads of 128, and a bfloat16 key of 128 for all of them."""
    spec = read_spec("MiniMax-M3")
    first, last = (spec.layers[i].mixers[0].caches(rank(8)) for i in (0, -1))
    assert [(c.slots, c.elements_per_token) for c in first if isinstance(c, TokenCache)] == [
        (1, 2 * 128)
    ]
    assert [(c.kind, c.elements_per_token, c.dtype) for c in last if isinstance(c, TokenCache)] == [
        (CacheKind.ATTENTION, 2 * 128, None),
        (CacheKind.INDEXER, 128, "BF16"),
    ]


def test_minimax_m3_fuses_its_index_into_the_projection() -> None:
    """vLLM's [q | k | v | index_q | index_k]: dealt, and a KV head's or the key's copy."""
    shapes = {w.name: w.rank_shape(rank(8)) for w in parameters(read_spec("MiniMax-M3"))}
    module = "model.layers.59.self_attn"
    assert shapes[f"{module}.qkv_proj.weight"] == ((64 // 8 + 1 + 1 + 1 + 1) * 128, 6144)
    assert shapes[f"{module}.index_k_norm.weight"] == (128,)
