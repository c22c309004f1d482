"""DeepSeek V4: caches, cuts and forms by vLLM's `models/deepseek_v4/`."""

from typing import Any

import pytest

from support.configs import read_config, read_spec
from tightfit.errors import LayoutError, UnsupportedModelError
from tightfit.model.cache import CacheKind, TokenCache
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import check_parallel, loaded_parameters
from tightfit.units import dtype_bytes


def rank(size: int) -> Rank:
    return Parallel(tensor_parallel_size=size).ranks()[0]


def rows(layer: int, size: int = 1) -> list[tuple[CacheKind, int, int | None, int, int | None]]:
    mixer = read_spec("DeepSeek-V4-Flash").layers[layer].mixers[0]
    caches = [cache for cache in mixer.caches(rank(size)) if isinstance(cache, TokenCache)]
    return [
        (
            cache.kind,
            dtype_bytes(cache.dtype or "BF16", cache.elements_per_token),
            cache.window,
            cache.tokens_per_row,
            cache.block_size,
        )
        for cache in caches
    ]


WINDOW = (CacheKind.LATENT, 584, 128, 1, 64)


@pytest.mark.parametrize("size", [1, 8])
def test_layers_of_three_kinds(size: int) -> None:
    """Windows alone, rows of 4 tokens with an indexer, and rows of 128 without."""
    assert rows(0, size) == [WINDOW]
    assert rows(2, size) == [
        WINDOW,
        (CacheKind.LATENT, 584, None, 4, None),
        (CacheKind.PARTIAL, 2 * 2 * 512 * 4, 8, 1, 4),
        (CacheKind.INDEXER, 132, None, 4, None),
        (CacheKind.PARTIAL, 2 * 2 * 128 * 4, 8, 1, 4),
    ]
    assert rows(3, size) == [
        WINDOW,
        (CacheKind.LATENT, 584, None, 128, None),
        (CacheKind.PARTIAL, 2 * 512 * 4, 128, 1, 8),
    ]


def test_experts_are_fp4_and_the_rest_fp8() -> None:
    spec = read_spec("DeepSeek-V4-Flash")
    held = {w.name: (w.dtype, w.rank_shape(rank(8))) for w in loaded_parameters(spec)}
    assert held["layers.5.ffn.experts.w13_weight"] == ("U8", (256, 2 * 2048 // 8, 4096 // 2))
    assert held["layers.5.ffn.experts.w2_weight_scale"] == ("U8", (256, 4096, 2048 // 8 // 32))
    assert held["layers.5.attn.wo_a.weight"] == ("F8_E4M3", (1024, 64 * 512 // 8))
    assert held["layers.5.attn.wo_a.weight_scale_inv"] == ("F8_E8M0", (8, 32))
    assert held["layers.5.hc_ffn_fn"] == ("F32", (24, 4 * 4096))
    assert "layers.2.ffn.gate.tid2eid" in held
    assert "layers.3.ffn.gate.tid2eid" not in held


def test_groups_of_heads_are_not_split() -> None:
    with pytest.raises(LayoutError) as e:
        check_parallel(read_spec("DeepSeek-V4-Flash"), Parallel(tensor_parallel_size=16))
    assert "o_groups" in e.value.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": [8] * 44}, "a compress_ratio of 8 is not modelled"),
        ({"vision_n_layers": 2}, "the vision tower of DeepSeek V4 is not modelled"),
        ({"expert_dtype": "fp6"}, "an expert_dtype of 'fp6' is not modelled"),
    ],
)
def test_what_is_not_modelled(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError) as e:
        model_spec({**read_config("DeepSeek-V4-Flash"), **changes})
    assert e.value.message == message
