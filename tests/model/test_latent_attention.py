"""Latent attention: what a rank holds and keeps, against vLLM's own modules and formulas.

Bytes of DeepSeek-V2-Lite are those of vLLM 0.32's modules, built on torch's meta device. Caches are
vLLM's `MLAAttentionSpec`s: `kv_lora_rank + qk_rope_head_dim` features, alike on every rank, and for
an indexer uint8 rows of its head and one float32 scale per 128 features.
"""

import re
from typing import Any

import pytest

from support.configs import read_config, read_spec
from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.cache import CacheKind, TokenCache
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import parameters
from tightfit.model.spec import ModelSpec, ropes
from tightfit.planner.weights import weights_component
from tightfit.units import GiB, dtype_bytes


def ranks(size: int) -> tuple[Rank, ...]:
    return Parallel(tensor_parallel_size=size).ranks()


def bytes_per_token(spec: ModelSpec, rank: Rank, kind: CacheKind) -> int:
    caches = [c for layer in spec.layers for mixer in layer.mixers for c in mixer.caches(rank)]
    return sum(
        dtype_bytes(cache.dtype or "BF16", cache.elements_per_token)
        for cache in caches
        if isinstance(cache, TokenCache) and cache.kind is kind
    )


@pytest.mark.parametrize(("size", "expected"), [(1, 31_412_968_448), (4, 7_906_319_360)])
def test_bytes_are_those_of_vllm_modules(size: int, expected: int) -> None:
    spec = read_spec("DeepSeek-V2-Lite")
    for rank in ranks(size):
        assert weights_component(spec, rank, "BF16").planned_bytes == expected


@pytest.mark.parametrize(("size", "gibibytes"), [(1, 0.105), (4, 0.026)])
def test_copies_for_absorption(size: int, gibibytes: float) -> None:
    spec = read_spec("DeepSeek-V2-Lite")
    mixers = [layer.mixers[0] for layer in spec.layers]
    copies = [m.absorbed_elements(ranks(size)[0]) for m in mixers if isinstance(m, LatentAttention)]
    assert len(copies) == spec.num_layers
    assert round(sum(copies) * 2 / GiB, 3) == gibibytes


@pytest.mark.parametrize(
    ("name", "latent", "index"),
    [
        ("DeepSeek-V2-Lite", 27 * 576 * 2, 0),
        ("DeepSeek-V3", 61 * 576 * 2, 0),
        ("DeepSeek-V3.2", 61 * 576 * 2, 61 * 132),
        ("GLM-5", 78 * 576 * 2, 78 * 132),
        ("GLM-4.7-Flash", 47 * 576 * 2, 0),
        ("Kimi-K2-Instruct", 61 * 576 * 2, 0),
    ],
)
def test_caches_are_alike_on_every_rank(name: str, latent: int, index: int) -> None:
    spec = read_spec(name)
    for rank in (*ranks(1), *ranks(4)):
        assert bytes_per_token(spec, rank, CacheKind.LATENT) == latent
        assert bytes_per_token(spec, rank, CacheKind.INDEXER) == index
        assert bytes_per_token(spec, rank, CacheKind.ATTENTION) == 0


def test_minicpm3_keeps_whole_heads() -> None:
    """vLLM pads values to the 96 features of a key, and deals the 40 heads."""
    spec = read_spec("MiniCPM3-4B")
    for size in (1, 2, 8):
        expected = 62 * (40 // size) * (96 + 96) * 2
        assert bytes_per_token(spec, ranks(size)[0], CacheKind.ATTENTION) == expected
    names = {
        w.name.rsplit("self_attn.", 1)[1] for w in parameters(spec) if ".0.self_attn" in w.name
    }
    assert "fused_qkv_a_proj.weight" not in names
    assert {"q_a_proj.weight", "kv_a_proj_with_mqa.weight"} <= names


def test_rope_is_deepseeks_yarn() -> None:
    """Its table has original_max_position_embeddings x factor rows of qk_rope_head_dim."""
    (rope,) = ropes(read_spec("DeepSeek-V3").layers)
    assert rope.rotary_dim == 64
    assert rope.scaling is not None
    assert rope.scaling["rope_type"] == "deepseek_yarn"
    rows = rope.scaling["original_max_position_embeddings"] * rope.scaling["factor"]
    assert rows == 163_840


def test_an_indexer_that_pairs_otherwise_has_a_table_of_its_own() -> None:
    assert len(ropes(read_spec("DeepSeek-V3.2").layers)) == 2
    assert len(ropes(read_spec("GLM-5").layers)) == 1


def changed(name: str, **changes: Any) -> ModelSpec:
    return model_spec({**read_config(name), **changes})


def indexers(spec: ModelSpec) -> list[bool]:
    mixers = [layer.mixers[0] for layer in spec.layers]
    return [isinstance(m, LatentAttention) and m.indexer is not None for m in mixers]


def test_layers_that_reuse_a_choice_have_no_indexer() -> None:
    every_third = changed("GLM-5", index_topk_freq=3)
    assert indexers(every_third)[:8] == [True, True, False, False, True, False, False, True]
    assert all(
        isinstance(layer.mixers[0], LatentAttention) and layer.mixers[0].index_topk == 2048
        for layer in every_third.layers
    )
    assert indexers(changed("GLM-5", index_topk_pattern="FSSF"))[:5] == [
        True, False, False, True, True,
    ]  # fmt: skip


def test_queries_without_a_low_rank() -> None:
    """`q_lora_rank: null` is not the class's default of 1536."""
    mixer = read_spec("DeepSeek-V2-Lite").layers[0].mixers[0]
    assert isinstance(mixer, LatentAttention)
    assert mixer.q_lora_rank is None
    config = read_config("DeepSeek-V2-Lite")
    del config["q_lora_rank"]
    mixer = model_spec(config).layers[0].mixers[0]
    assert isinstance(mixer, LatentAttention)
    assert mixer.q_lora_rank == 1536


def test_layers_that_predict_further_tokens_are_not_loaded() -> None:
    (pattern,) = read_spec("DeepSeek-V3").ignored_sources
    assert re.search(pattern, "model.layers.61.eh_proj.weight")
    assert re.search(pattern, "language_model.model.layers.61.mlp.experts.0.up_proj.weight")
    for loaded in ("6", "60", "161", "610"):
        assert not re.search(pattern, f"model.layers.{loaded}.mlp.gate.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias in DeepseekV3ForCausalLM is not modelled"),
        ({"is_causal": False}, "DeepseekV3ForCausalLM with is_causal = false is not modelled"),
        (
            {"mlp_layer_types": ["sparse"] * 61},
            "config.json has mlp_layer_types that differ from first_k_dense_replace or the like, "
            "which is not modelled",
        ),
    ],
)
def test_what_engines_would_read_otherwise_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError) as e:
        changed("DeepSeek-V3", **changes)
    assert e.value.message == message
