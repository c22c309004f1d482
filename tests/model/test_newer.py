"""Mixtures of 2024 to 2026: what is published of their sizes, their caches, what is refused.

Shapes and dtypes of small ones were compared with vLLM 0.32's own modules on one and two
ranks, and so were the caches that its layers ask for.
"""

from typing import Any

import pytest

from support.configs import read_config, read_spec
from tightfit.errors import ConfigError, TightfitError, UnsupportedModelError
from tightfit.model.cache import CacheKind, StateCache, TokenCache
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel
from tightfit.model.parameters import parameter_count, plain_parameters
from tightfit.model.sources import source_shapes
from tightfit.model.spec import ModelSpec


def caches(spec: ModelSpec, tensor_parallel_size: int = 1) -> list[TokenCache]:
    rank = Parallel(tensor_parallel_size=tensor_parallel_size).ranks()[0]
    found = [c for layer in spec.layers for m in layer.mixers for c in m.caches(rank)]
    assert all(isinstance(cache, TokenCache) for cache in found)
    return [cache for cache in found if isinstance(cache, TokenCache)]


def changed(name: str, **changes: Any) -> ModelSpec:
    return model_spec({**read_config(name), **changes})


def test_counts_as_published() -> None:
    """Those of safetensors' metadata on the Hub, and else the billions of the model cards."""
    exact = {
        "deepseek-moe-16b-base": 16_375_728_128,
        "Ling-mini-2.0": 16_255_643_392,
        "Zamba2-7B": 7_356_749_648,
        "Zamba2-1.2B": 1_215_064_704,
    }
    assert {name: parameter_count(read_spec(name)) for name in exact} == exact
    billions = {
        "Ling-lite": 16.8,
        "Trinity-Mini": 26.1,
        "K-EXAONE-236B-A23B": 236.6,
        "LongCat-Flash-Chat": 560.7,
        "Step-3.5-Flash": 197.0,
        "FLM-2-52B": 52.8,
    }
    found = {name: round(parameter_count(read_spec(name)) / 1e9, 1) for name in billions}
    assert found == billions


def test_longcat_has_two_latent_caches_in_a_layer() -> None:
    spec = read_spec("LongCat-Flash-Chat")
    kept = caches(spec, 8)
    assert {(one.kind, one.elements_per_token) for one in kept} == {(CacheKind.LATENT, 512 + 64)}
    assert (spec.num_layers, len(kept)) == (28, 56)
    shapes = source_shapes(spec)
    assert shapes["model.layers.0.mlp.router.classifier.weight"] == (512 + 256, 6144)
    assert "model.layers.0.mlp.experts.512.gate_proj.weight" not in shapes


@pytest.mark.parametrize(
    ("name", "full", "sliding", "window", "elements"),
    [
        ("deepseek-moe-16b-base", 28, 0, None, 16 * 2 * 128),
        ("Ling-mini-2.0", 20, 0, None, 4 * 2 * 128),
        ("Trinity-Mini", 8, 24, 2048, 4 * 2 * 128),
        ("K-EXAONE-236B-A23B", 12, 36, 128, 8 * 2 * 128),
        # Two dense layers before 30 with experts, of which every fourth sees everything.
        ("synthetic-cohere2-moe", 2 + 7, 23, 4096 + 1, 8 * 2 * 128),
        ("Step-3.5-Flash", 12, 33, 512, 8 * 2 * 128),
    ],
)
def test_caches(name: str, full: int, sliding: int, window: int | None, elements: int) -> None:
    kept = caches(read_spec(name))
    assert {cache.elements_per_token for cache in kept} == {elements}
    windows = [cache.window for cache in kept]
    assert (windows.count(None), len(windows)) == (full, full + sliding)
    assert {one for one in windows if one is not None} == ({window} if window else set())


def test_step_has_more_heads_where_it_slides() -> None:
    shapes = source_shapes(read_spec("Step-3.5-Flash"))
    at = "model.layers.{}.self_attn.{}.weight"
    heads = {i: shapes[at.format(i, "g_proj")] for i in (0, 1)}
    assert heads == {0: (64, 4096), 1: (96, 4096)}
    assert shapes[at.format(1, "q_proj")] == (96 * 128, 4096)
    assert shapes["model.layers.3.moe.gate_proj.weight"] == (288, 1280, 4096)
    assert shapes["model.layers.3.share_expert.gate_proj.weight"] == (1280, 4096)


def test_step_scales_the_rope_of_full_attention_alone() -> None:
    ropes = [layer.attention.rope for layer in read_spec("Step-3.5-Flash").layers[:2]]
    assert [rope and (rope.theta, rope.rotary_dim) for rope in ropes] == [(5e6, 64), (1e4, 128)]
    assert [rope is not None and rope.scaling is None for rope in ropes] == [False, True]


def test_ling_1_may_normalize_with_biases() -> None:
    spec = changed("Ling-lite", use_qk_norm=True)
    names = {weight.name for weight in plain_parameters(spec)}
    assert "model.layers.0.attention.query_layernorm.bias" in names
    assert "model.layers.0.mlp.gate.expert_bias" not in names


def test_k_exaone_by_its_published_name() -> None:
    spec = changed("K-EXAONE-236B-A23B", architectures=["ExaoneMoEForCausalLM"])
    assert parameter_count(spec) == parameter_count(read_spec("K-EXAONE-236B-A23B"))


def test_mistral_large_3_is_deepseek_v3() -> None:
    spec = changed("DeepSeek-V3", architectures=["MistralLarge3ForCausalLM"])
    assert parameter_count(spec) == parameter_count(read_spec("DeepSeek-V3"))
    assert not spec.verified_for_sharding


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("deepseek-moe-16b-base", {"n_routed_experts": None}, ConfigError),
        ("deepseek-moe-16b-base", {"model_type": "deepseek_v2"}, UnsupportedModelError),
        ("Ling-lite", {"use_bias": None}, UnsupportedModelError),
        ("Ling-mini-2.0", {"use_bias": True}, UnsupportedModelError),
        ("Trinity-Mini", {"tie_word_embeddings": True}, UnsupportedModelError),
        ("K-EXAONE-236B-A23B", {"mlp_layer_types": ["dense"]}, ConfigError),
        ("K-EXAONE-236B-A23B", {"sliding_windows": [128] * 48}, UnsupportedModelError),
        ("synthetic-cohere2-moe", {"attention_bias": True}, UnsupportedModelError),
        ("Step-3.5-Flash", {"moe_layers_enum": "3,x"}, ConfigError),
        ("Step-3.5-Flash", {"layer_types": ["full_attention"]}, ConfigError),
        ("Step-3.5-Flash", {"rope_theta": [1e4]}, ConfigError),
        ("Step-3.5-Flash", {"att_impl_type": "MFA"}, UnsupportedModelError),
        ("LongCat-Flash-Chat", {"zero_expert_type": "copy"}, UnsupportedModelError),
        ("Zamba2-7B", {"num_key_value_heads": 8}, UnsupportedModelError),
        ("Zamba2-7B", {"layers_block_type": None}, ConfigError),
        ("Zamba2-7B", {"n_mamba_heads": 111}, ConfigError),
        ("Olmo-Hybrid-7B", {"linear_num_value_heads": 31}, ConfigError),
    ],
)
def test_refused(name: str, changes: dict[str, Any], error: type[TightfitError]) -> None:
    with pytest.raises(error):
        changed(name, **changes)


def test_olmo_hybrid_has_a_state_in_three_layers_of_four() -> None:
    """30 heads of keys of 96 and values of 192, of which a rank of two has 15."""
    spec = read_spec("Olmo-Hybrid-7B")
    rank = Parallel(tensor_parallel_size=2).ranks()[0]
    kept = [cache for layer in spec.layers for m in layer.mixers for cache in m.caches(rank)]
    states = [cache for cache in kept if isinstance(cache, StateCache)]
    assert (len(states), len(kept)) == (24, 32)
    assert {tuple(state.shape for state in cache.states) for cache in states} == {
        ((3, 15 * (2 * 96 + 192)), (15, 192, 96))
    }
    assert {c.elements_per_token for c in kept if isinstance(c, TokenCache)} == {15 * 2 * 128}
    assert [layer.norms and layer.norms[0] for layer in spec.layers[2:4]] == [
        "input_layernorm",
        "post_attention_layernorm",
    ]


def test_olmo_hybrid_rotates_only_with_a_rope() -> None:
    plain, rotated = (
        changed("Olmo-Hybrid-7B", rope_parameters=one).layers[3].attention.rope
        for one in (None, {"rope_type": "default", "rope_theta": 500_000.0})
    )
    assert plain is None
    assert rotated is not None
    assert rotated.theta == 500_000.0


def test_telechat_deals_keys_and_values_of_a_fused_matrix() -> None:
    spec = read_spec("TeleChat2-7B")
    at = "transformer.h.0.self_attention"
    shapes = source_shapes(spec)
    assert shapes[f"{at}.key_value.weight"] == (2 * 4096, 4096)
    assert f"{at}.query.bias" not in shapes
    assert shapes[f"{at}.dense.bias"] == (4096,)
    mlp = "transformer.h.0.mlp"
    assert f"{mlp}.up_proj.bias" not in shapes
    assert shapes[f"{mlp}.down_proj.bias"] == (4096,)
    fused = next(w for w in plain_parameters(spec) if w.name == f"{at}.qkv_proj.weight")
    last = Parallel(tensor_parallel_size=32).ranks()[-1]
    starts = [piece.start[0] for piece in fused.rank_tensor(last, "F16").pieces]
    assert starts == [31 * 128, 62 * 128, 63 * 128]


def test_zamba_shares_two_transformers_and_no_cache() -> None:
    """13 layers of 81 keep keys and values of twice the hidden size; the first two own weights."""
    spec = read_spec("Zamba2-7B")
    rank = Parallel(tensor_parallel_size=2).ranks()[0]
    kept = [cache for layer in spec.layers for m in layer.mixers for cache in m.caches(rank)]
    tokens = [cache for cache in kept if isinstance(cache, TokenCache)]
    assert (len(tokens), len(kept)) == (13, 81 + 13)
    assert {cache.elements_per_token for cache in tokens} == {16 * 2 * 224}
    states = {tuple(s.shape for s in c.states) for c in kept if isinstance(c, StateCache)}
    assert states == {((3, 56 * 64 + 2 * 64), (56, 64, 64))}
    shapes = source_shapes(spec)
    shared = {name.split(".")[2] for name in shapes if ".shared_transformer.self_attn." in name}
    assert shared == {"6", "11"}
    own = [name for name in shapes if name.endswith(".linear.weight")]
    assert len(own) == 13
    at = "model.layers.11.shared_transformer"
    assert shapes[f"{at}.self_attn.o_proj.weight"] == (3584, 7168)
    assert shapes[f"{at}.input_layernorm.weight"] == (7168,)
    assert shapes[f"{at}.feed_forward.gate_up_proj_adapter_list.3.1.weight"] == (2 * 14_336, 128)
    assert f"{at}.feed_forward.gate_up_proj_adapter_list.2.1.weight" not in shapes


def test_what_run_would_not_compute_is_said() -> None:
    """Plans need no more than sizes; `run` refuses what it would compute otherwise."""
    names = ("Ling-lite", "Step-3.5-Flash", "LongCat-Flash-Chat", "FLM-2-52B", "TeleChat2-7B")
    assert all(read_spec(name).unmodelled for name in (*names, "Zamba2-7B"))
    assert read_spec("Ling-mini-2.0").unmodelled is None
